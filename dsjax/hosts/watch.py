"""Notices that a process is killed, frozen, cut off or stuck, names it in one line and ends this one.

Two daemon threads, so that it works whatever the main thread is in (a collective, a compilation, a barrier):

- *pulse* writes this process's heartbeat to the coordination service, and reads those of others: process 0 reads all,
  the others only that of process 0, so that traffic grows with the number of processes and not with its square;
- *judge* looks at the time since each heartbeat last changed, and waits for the word of a process that ends.

Process 0 tells the others whom it has lost, and ends last, since they would otherwise take it for the lost one. A
process that loses process 0 itself (frozen, cut off) can not ask anybody. If process 0 is killed, the connection
breaks and :meth:`Watch.leader_is_gone` is called within milliseconds.

``lost_after`` must exceed every pause in which Python's other threads can not run: tracing and pure Python hand over
every 5 ms, but a long call into C that keeps the lock (lowering a large program, garbage collection, parsing a large
JSON file) takes seconds. Only time in which the judge itself ran counts, so a pause of this process (or of the whole
machine) does not make others look lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import re
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from dsjax.hosts.join import HostsConfig, title
from dsjax.hosts.store import Store, StoreError

EXIT_HOST_LOST = 75  # EX_TEMPFAIL: start all processes again

_NETWORK = re.compile(
    r"gloo|nccl|megascale|unavailable|deadline.exceeded|aborted|cancelled|heartbeat|barrier|coordination"
    r"|connection (reset|closed|refused)|socket closed|timed? ?out",
    re.IGNORECASE,
)


def is_network_error(error: BaseException) -> bool:
    """Whether an error, or what it comes from, may be due to the loss of a peer."""
    link: BaseException | None = error
    for _ in range(20):
        if link is None:
            break
        if isinstance(link, (RuntimeError, ValueError, OSError)) and _NETWORK.search(str(link)):
            return True
        link = link.__cause__ or link.__context__
    return False


def _within(seconds: float, function: Callable[[], object]) -> None:
    """Calls ``function``, but does not wait longer: process 0 may be frozen."""

    def run() -> None:
        with contextlib.suppress(StoreError):
            function()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)


@dataclasses.dataclass
class _Seen:
    """What is known of a process; times are those of the judge's clock."""

    beats: int = -1
    beat_at: float = 0.0
    step: int = -1  # -1: it has not begun
    turns: int = 0
    turn_at: float = 0.0


class Watch:
    """The two threads of one process. ``store`` is set before :meth:`start`."""

    store: Store

    def __init__(self, index: int, names: list[str], config: HostsConfig):
        self._index, self._names, self.config = index, names, config
        self._seen = [_Seen() for _ in names]
        self._step, self._turns = -1, 0
        self._clock = 0.0  # seconds in which the judge was running
        self._begun: float | None = None  # when the first process began to count steps
        self._done = threading.Event()
        self._ending = threading.Lock()

    def start(self) -> None:
        """Begins to watch."""
        for run in (self._pulse, self._judge):
            threading.Thread(target=run, name=f"hosts{run.__name__}", daemon=True).start()

    def stop(self) -> None:
        """The run is done: what happens to others no longer matters."""
        self._done.set()

    def beat(self, step: int | None) -> None:
        """This process makes progress."""
        self._step = self._step if step is None else step
        self._turns += 1

    # ---------------------------------------------------------------- the two threads

    def _pulse(self) -> None:
        beats = 0
        while not self._done.is_set():
            with contextlib.suppress(StoreError):
                self.store.set(f"beat/{self._index}", json.dumps([beats, self._step, self._turns]))
                if self._index:
                    found = self.store.get("beat/0", self.config.period)
                    self._note(0, found)
                else:
                    for process, found in self.store.under("beat").items():
                        self._note(int(process), found)
            beats += 1
            self._done.wait(self.config.period)

    def _note(self, process: int, found: str | None) -> None:
        if found is None:
            return
        beats, step, turns = json.loads(found)
        seen = self._seen[process]
        if beats != seen.beats:
            seen.beats, seen.beat_at = beats, self._clock
        if turns != seen.turns:
            seen.step, seen.turns, seen.turn_at = step, turns, self._clock
            if self._begun is None:
                self._begun = self._clock

    def _judge(self) -> None:
        last = time.monotonic()
        while not self._done.is_set():
            try:
                end = self.store.get("end", self.config.period)
            except StoreError:
                end = None
                self._done.wait(self.config.period)
            if self._done.is_set():
                return
            if end is not None:
                self._obey(**json.loads(end))
            now = time.monotonic()
            self._clock += min(now - last, 2 * self.config.period)
            last = now
            self._look_for_lost()
            if not self._index:
                self._look_for_stalled()

    def _look_for_lost(self) -> None:
        watched = range(1, len(self._names)) if not self._index else (0,)
        silent = {process: self._clock - self._seen[process].beat_at for process in watched}
        if max(silent.values()) <= self.config.lost_after:
            return
        # Of processes that went at the same time, one is found a moment before the other.
        lost = [process for process, seconds in silent.items() if seconds > 0.75 * self.config.lost_after]
        who = " and ".join(title(process, self._names) for process in lost)
        sentence = f"{who} {'were' if len(lost) > 1 else 'was'} lost: no sign of life for {max(silent.values()):.0f} s"
        if self._index:
            sentence += ", or this host has lost its network"
            self._end(EXIT_HOST_LOST, sentence)
        self._end_all(EXIT_HOST_LOST, sentence, lost)

    def _look_for_stalled(self) -> None:
        if self._begun is None:
            return
        begun = self._begun
        ages = [self._clock - max(seen.turn_at, begun) for seen in self._seen]
        if max(ages) <= self.config.stall_after:
            return
        steps = [seen.step for seen in self._seen]
        behind = [process for process, step in enumerate(steps) if step == min(steps)]
        who = " and ".join(title(process, self._names) for process in behind)
        where = f"at step {min(steps)}" if min(steps) >= 0 else "before the first step"
        sentence = f"{who} made no progress for {max(ages):.0f} s {where}"
        if max(steps) > min(steps):
            sentence += f", while others reached step {max(steps)}"
        self._end_all(EXIT_HOST_LOST, sentence, behind, stuck=True)

    # ---------------------------------------------------------------- ending

    def _end_all(self, code: int, sentence: str, blamed: list[int], stuck: bool = False) -> None:
        """Process 0 tells everybody; the judge's next turn then reads it like everybody else's."""
        record = {"by": self._index, "code": code, "sentence": sentence, "blamed": blamed, "stuck": stuck}
        with contextlib.suppress(StoreError):
            self.store.set_first("end", json.dumps(record))

    def _obey(self, by: int, code: int, sentence: str, blamed: list[int], stuck: bool) -> None:
        """Ends because another process, or the watch of process 0, has said so."""
        if stuck and self._index in blamed:
            faulthandler.dump_traceback()  # where it is stuck
        self._end(code, sentence, gone=blamed if not stuck else [])

    def leader_is_gone(self) -> None:
        """Called when process 0 has closed its connection, on a thread of JAX's client that must not go on."""
        if not self._done.is_set():
            self._end(EXIT_HOST_LOST, f"{title(0, self._names)} was lost: it closed its connection")
        threading.Event().wait()

    def _end(self, code: int, sentence: str, gone: list[int] | None = None) -> NoReturn:
        if not self._ending.acquire(blocking=False):  # another thread does
            threading.Event().wait()
        # Not by print: the main thread may be in the middle of one, and hold its lock.
        with contextlib.suppress(OSError):
            os.write(2, f"\ndsjax: {sentence}\n".encode(errors="replace"))
        self._take_leave(gone or [])
        os._exit(code)

    def _take_leave(self, gone: list[int]) -> None:
        """Lets process 0 know that this one has heard of the end; process 0 waits for that."""
        if self._index:
            _within(1.0, lambda: self.store.set(f"heard/{self._index}", ""))
            return
        deadline, others = time.monotonic() + self.config.linger, set(range(1, len(self._names))) - set(gone)
        with contextlib.suppress(StoreError):
            while time.monotonic() < deadline and others - {int(p) for p in self.store.under("heard")}:
                time.sleep(0.05)
            time.sleep(0.2)  # between hearing and having ended

    def leave(self, code: int, sentence: str) -> None:
        """Tells the others that this process ends, and of what."""
        if self._done.is_set():
            return
        if not self._ending.acquire(blocking=False):  # the end was already told to this process
            time.sleep(self.config.linger + 2)
            return
        said = f"{title(self._index, self._names)} stopped: {sentence}"
        record = {"by": self._index, "code": code, "sentence": said, "blamed": [self._index], "stuck": False}
        _within(5.0, lambda: self.store.set_first("end", json.dumps(record)))
        self._take_leave([])
        self._done.set()

    def wait_for_verdict(self) -> None:
        """Returns if nobody is found to be lost within the time that this takes."""
        time.sleep(self.config.lost_after + 5 * self.config.period + self.config.linger)
