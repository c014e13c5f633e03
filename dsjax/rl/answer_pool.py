"""Answers that are judged in processes of their own: as mathematics (math-verify), and by reasoning-gym's scorers.

    with AnswerPool(workers=2) as pool:
        verdicts = pool.check([Answer("math", "\\\\frac{1}{2}", "0.5"), ...])

An answer may take its seconds of processor time; math-verify's own limits are alarms, for which it takes a main
thread. What becomes of an answer that raises, loops or takes all memory: if the right one does not, it is wrong. If the
right one does so too, or there is trouble with processes, three times, nothing is known: that is no 0.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import os
import queue
import weakref
from collections.abc import Sequence
from typing import Any, Literal

from dsjax.config import UserError
from dsjax.rl import plain
from dsjax.rl.worker_process import Trouble, WorkerProcess

Kind = Literal["math", "gym"]
PACKAGES = {"math": ("math_verify", "math-verify"), "gym": ("reasoning_gym", "reasoning-gym")}
ATTEMPTS = 3  # at one answer, when trouble is not its own
START = 120.0  # seconds for a process to import its libraries
PATIENCE = 60.0, 20.0  # seconds, and times an answer's own, after which a process is given up
OWN_ENDS = ("SIGPROF", "SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE")  # by which an answer ends its judge


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer to be judged.

    Attributes:
        kind: by what.
        right: the right answer; empty: none is known.
        text: the answer.
        data: for "gym" name, level and entry (:mod:`dsjax.rl.exercises.gym`).
    """

    kind: Kind
    right: str
    text: str
    data: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Judged:
    """What became of an answer.

    Attributes:
        score: from 0 to 1; None: nothing is known, by no fault of the answer's; ``reason`` says why.
        reason: "" or why there is no score, or no better one: "timeout", "raised ValueError: ...", "died: SIGSEGV",
            "exercise: ...", "infrastructure: ...".
    """

    score: float | None
    reason: str = ""


class AnswerPool:
    """Processes that judge answers, for several threads too; started when they are needed, ended when it is closed,
    left or no longer used.

    Args:
        workers: answers that are judged at the same time.
        seconds: of processor time for each.
    """

    def __init__(self, workers: int = 1, seconds: float = 5.0) -> None:
        self._seconds = seconds
        self._idle: dict[str, queue.SimpleQueue[_Worker | None]] = {}
        for kind in PACKAGES:
            self._idle[kind] = queue.SimpleQueue()
            for _ in range(workers):
                self._idle[kind].put(None)
        self._threads = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="answers")
        self.close = weakref.finalize(self, _close, self._threads, tuple(self._idle.values()), os.getpid())

    def __enter__(self) -> AnswerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self, answers: Sequence[Answer]) -> list[Judged]:
        """What becomes of each answer, in their order. Raises ``UserError`` if what judges them is not installed."""
        for kind in {answer.kind for answer in answers}:
            module, package = PACKAGES[kind]
            if importlib.util.find_spec(module) is None:
                raise UserError(f"answers are judged by {package}, which is not installed: pip install 'dsjax[math]'")
        return list(self._threads.map(self._judged, answers))

    def _judged(self, answer: Answer) -> Judged:
        try:
            score, reason = self._score(answer)
            if score is not None:
                return Judged(score)
            # The witness: if the right answer is judged, it was this one's fault. Where none is known, it is, too.
            if answer.right and answer.text != answer.right:
                score, reason_of_right = self._score(dataclasses.replace(answer, text=answer.right))
                return Judged(None, f"exercise: {reason_of_right}") if score is None else Judged(0.0, reason)
            return Judged(None, f"exercise: {reason}") if answer.right else Judged(0.0, reason)
        except Trouble as trouble:
            return Judged(None, f"infrastructure: {trouble}")

    def _score(self, answer: Answer) -> tuple[float | None, str]:
        """The score, or why the answer's judge came to none; raises ``Trouble`` that is not the answer's, thrice."""
        request = {"kind": answer.kind, "right": answer.right, "answer": answer.text, "seconds": self._seconds}
        if answer.kind == "gym":
            request |= {**answer.data, "entry": plain.decode(answer.data["entry"])}
            request["prepare"] = [answer.data["name"], answer.data["level"]]
        message = plain.pack(request)
        for attempt in range(ATTEMPTS):
            worker = self._idle[answer.kind].get()
            try:
                worker = worker or _Worker(answer.kind)
                reply = worker.ask(message, PATIENCE[0] + PATIENCE[1] * self._seconds)
                if reply.get("died", OWN_ENDS[0]) not in OWN_ENDS:
                    raise Trouble(f"a judge was ended by {reply['died']}")
            except Trouble:
                if worker is not None:
                    worker.close()
                worker = None
                if attempt + 1 == ATTEMPTS:
                    raise
            else:
                if "score" in reply:
                    return min(max(reply["score"], 0.0), 1.0), ""
                if "raised" in reply:
                    return None, f"raised {reply['raised']}"
                return None, "timeout" if reply["died"] == "SIGPROF" else f"died: {reply['died']}"
            finally:
                self._idle[answer.kind].put(worker)
        raise AssertionError


class _Worker(WorkerProcess):
    """A process of ``dsjax.rl.answer_judge``. Raises ``Trouble``."""

    def __init__(self, kind: str) -> None:
        super().__init__("answer_judge", [kind], called="a judge")
        self.first_word(START)


def _close(
    threads: concurrent.futures.ThreadPoolExecutor, idle: Sequence[queue.SimpleQueue[_Worker | None]], owner: int
) -> None:
    """Waits for what is being judged, and ends the processes; in a fork of their owner it does nothing."""
    if os.getpid() != owner:
        return
    threads.shutdown(wait=True, cancel_futures=True)
    for own in idle:
        with contextlib.suppress(queue.Empty):
            while True:
                worker = own.get_nowait()
                if worker is not None:
                    worker.close()
