"""The processes of a run: how they join, tell each other things, agree, and notice that one of them is gone.

    start(...)                  joins, if the flags or the environment ask for it
    index(), count(), name(i)   who this is, how many there are, what a message calls them
    exchange(name, value)       the values of all processes; same(name, value): they must be equal
    Agreement().ask(flag)       whether any process asks to stop; every process learns it at the same step
    beat(step)                  this process makes progress; beat(), within a step
    finish() or leave(code, sentence)   the end: all together, or this process alone, which ends the others

Without :func:`start` there is one process, and every function does what is right for one, at no cost.

A process that is killed, frozen or cut off is named by the others within ``HostsConfig.lost_after`` seconds; they end
with :data:`EXIT_HOST_LOST` (see :mod:`dsjax.hosts.watch`). Nothing here waits without a limit.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import threading
import time
from typing import Any

from dsjax.config import UserError
from dsjax.hosts.join import HostLost, HostsConfig, Place, RollCall, find_place, roll_call, title
from dsjax.hosts.store import Store, StoreError
from dsjax.hosts.watch import EXIT_HOST_LOST, Watch, is_network_error

__all__ = [
    "EXIT_HOST_LOST",
    "Agreement",
    "HostLost",
    "HostsConfig",
    "beat",
    "blame",
    "count",
    "exchange",
    "finish",
    "index",
    "leave",
    "name",
    "same",
    "start",
]

CONNECT_SECONDS = 15  # after the roll call everybody is there
SHUTDOWN_SECONDS = 10


@dataclasses.dataclass
class _Joined:
    """What a process of several knows."""

    place: Place
    names: list[str]
    store: Store
    watch: Watch
    calls: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


_joined: _Joined | None = None  # None: one process


def start(
    coordinator: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
    config: HostsConfig = HostsConfig(),
) -> None:
    """Joins the other processes; must come before the first use of a device.

    Args:
        coordinator: HOST:PORT of process 0; with the next two, or none of them: then the environment decides
            (see :func:`dsjax.hosts.join.find_place`), and where it speaks of one process, nothing is started.
        num_processes: of the run.
        process_id: which this is.
        config: time limits.

    Raises:
        UserError: the settings are wrong or contradict those of another process, or the port is taken.
        HostLost: not everybody came in time.
    """
    global _joined
    place = find_place(coordinator, num_processes, process_id, config)
    if place is None:
        return
    call = roll_call(place, config)
    try:
        client, watch = _connect(place, call, config)
    finally:
        call.close()
    _joined = _Joined(place, call.names, Store(client), watch)
    watch.start()


def _connect(place: Place, call: RollCall, config: HostsConfig) -> tuple[Any, Watch]:
    """``jax.distributed``, set up so that the loss of process 0 is told to the watch instead of aborting."""
    import jax
    from jax._src import distributed

    from dsjax.hosts.terminate import call_instead_of_abort

    # JAX's own heartbeats can only abort the process, so they are given time; ours, on the same service, come first.
    jax_heartbeat_seconds = int(10 * config.lost_after) + 60
    # It would take SIGTERM away from us.
    jax.config.update("jax_enable_preemption_service", False)
    watch = Watch(place.index, call.names, config)
    make_client = distributed._jax.get_distributed_runtime_client

    def make_watched_client(*args: Any, **options: Any) -> Any:
        options |= {"shutdown_timeout": SHUTDOWN_SECONDS, "shutdown_on_destruction": False}
        return make_client(*args, **options, missed_heartbeat_callback=lambda *status: watch.leader_is_gone())

    distributed._jax.get_distributed_runtime_client = make_watched_client
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            place.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=CONNECT_SECONDS,
            heartbeat_timeout_seconds=jax_heartbeat_seconds,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except RuntimeError:  # its text says nothing, see dsjax.hosts.terminate
        lost = [title(process, call.names) for process in call.who_is_lost()] or ["one of them"]
        raise HostLost(
            f"all {place.count} processes came to {place.coordinator}, but {' and '.join(lost)}"
            f" {'was' if len(lost) == 1 else 'were'} lost before all were connected"
        ) from None
    finally:
        distributed._jax.get_distributed_runtime_client = make_client
    call_instead_of_abort(watch.leader_is_gone)
    client = distributed.global_state.client
    watch.store = Store(client)
    return client, watch


def index() -> int:
    """Which of the processes this is; 0 speaks for all."""
    return _joined.place.index if _joined else 0


def count() -> int:
    """How many processes there are."""
    return _joined.place.count if _joined else 1


def name(process: int) -> str:
    """How messages call a process, for example ``process 1 (worker-1)``."""
    return title(process, _joined.names if _joined else [])


# ---------------------------------------------------------------- telling each other


def exchange(name: str, value: Any, timeout: float | None = None) -> list[Any]:
    """The values that all processes hand in under ``name``, in their order.

    Every process must call it as often as the others for each name, from one thread at a time for each name. It uses
    the coordination service, never a device, so any thread may call it while the devices work.

    Args:
        name: what the values are; no ``/``.
        value: anything that JSON can hold; what comes back has gone through JSON, also on one process.
        timeout: seconds to wait for the others; None: ``HostsConfig.stall_after``, since one that is dead is found
            sooner, and one that is slow may have much to do.

    Raises:
        HostLost: names who did not answer.
    """
    text = json.dumps(value)
    if _joined is None:
        return [json.loads(text)]
    run = _joined
    timeout = run.watch.config.stall_after if timeout is None else timeout
    with run.lock:
        run.calls[name] += 1
        call = run.calls[name]
    key, deadline = f"exchange/{name}/{call}", time.monotonic() + timeout
    with contextlib.suppress(StoreError):  # nobody there: found below
        run.store.set(f"{key}/{run.place.index}", text)
    if run.place.index:  # process 0 collects; a second more, so that it says who is missing
        reply = _wait_for(run, f"{key}/all", deadline + 1)
        answers = {"missing": [0]} if reply is None else json.loads(reply)
    else:
        texts = [_wait_for(run, f"{key}/{process}", deadline) for process in range(run.place.count)]
        missing = [process for process, found in enumerate(texts) if found is None]
        answers = {"missing": missing, "values": [json.loads(found) for found in texts if found is not None]}
        run.store.set(f"{key}/all", json.dumps(answers))
        run.store.delete(f"exchange/{name}/{call - 1}")  # everybody has read it, or would not be in this call
    if answers["missing"]:
        who = " and ".join(title(process, run.names) for process in answers["missing"])
        raise HostLost(f"{who} did not answer within {timeout:g} s when all were to tell {name!r}")
    return answers["values"]


def _wait_for(run: _Joined, key: str, deadline: float) -> str | None:
    """A value of the store; None: it did not come. In short waits, since Ctrl-C is only heard between them."""
    while True:
        left = deadline - time.monotonic()
        try:
            found = run.store.get(key, min(max(left, 0.001), 0.5))
        except StoreError:
            found = None
            time.sleep(0.2)
        if found is not None or left <= 0:
            return found


def same(name: str, value: Any, timeout: float | None = None) -> None:
    """Makes sure that all processes have the same value.

    Raises:
        UserError: names the first process that differs from process 0, and both values; of dictionaries, the key.
        HostLost: names who did not answer.
    """
    values = exchange(f"same {name}", value, timeout)
    names = _joined.names if _joined else []
    for process, other in enumerate(values):
        if other != values[0]:
            what, first, differs = _difference(name, values[0], other)
            raise UserError(
                f"{title(process, names)} has {what} {differs}, {title(0, names)} has {first};"
                " all processes must have the same"
            )


def _difference(what: str, first: Any, other: Any) -> tuple[str, str, str]:
    """Where two values differ, and how they read there."""
    if isinstance(first, dict) and isinstance(other, dict):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                return _difference(f"{what}.{key}", first.get(key), other.get(key))
    return what, repr(first)[:200], repr(other)[:200]


# ---------------------------------------------------------------- agreeing while training


class Agreement:
    """Whether any process asks for something (to stop), learnt by all of them at the same step.

    Every process calls :meth:`ask` once a step, right after it has dispatched the step. With several processes that
    dispatches a logical or over the devices, and returns the result of the call before: by then the devices are at
    the next step, so nothing waits for them beyond what reading the last step's numbers does. All processes dispatch
    the same computations in the same order, so the n-th call returns the same everywhere; the answer comes one step
    late everywhere. On one process it is immediate.
    """

    def __init__(self) -> None:
        self._asked: Any = None
        if count() == 1:
            return
        import jax
        import jax.numpy as jnp
        import numpy as np

        devices = jax.devices()
        if devices[0].platform == "cpu":  # each is a thread that waits: one of a process is fifteen times cheaper
            devices = [next(d for d in devices if d.process_index == process) for process in range(count())]
        mesh = jax.sharding.Mesh(np.asarray(devices), ("devices",))
        over, everywhere = (jax.sharding.NamedSharding(mesh, spec) for spec in (jax.P("devices"), jax.P()))
        # Made once, so that a step moves nothing to the devices.
        no, yes = np.zeros(mesh.size, bool), np.ones(mesh.size, bool)
        self._flags = [
            jax.make_array_from_callback(no.shape, over, no.__getitem__),
            jax.make_array_from_callback(yes.shape, over, yes.__getitem__),
        ]
        self._any = jax.jit(jnp.any, out_shardings=everywhere).lower(self._flags[0]).compile()

    def ask(self, flag: bool) -> bool:
        """Hands in this process's wish; returns whether any process had one at the call before."""
        if count() == 1:
            return flag
        before, self._asked = self._asked, self._any(self._flags[flag])
        return before is not None and bool(before.addressable_data(0))


# ---------------------------------------------------------------- living and ending


def beat(step: int | None = None) -> None:
    """This process is about to dispatch ``step``; None: it is still at the last one, and got on.

    From the first call on, ``HostsConfig.stall_after`` seconds without another one end the run. Called with the batch
    at hand and right before the step, it tells the process that hangs, one step behind, from those that wait for it.
    """
    if _joined:
        _joined.watch.beat(step)


def blame(error: BaseException) -> None:
    """If an error looks like the loss of a peer, waits for the watch to name it, which ends the process.

    A collective fails within milliseconds of the death of a peer, with a message about sockets; who it was is known
    some seconds later. Returns if the error is of another kind, or if nobody is found to be lost.
    """
    if _joined and is_network_error(error):
        _joined.watch.wait_for_verdict()


def leave(code: int, sentence: str) -> None:
    """Says that this process is about to end with ``code``, so that the others end with the same one, and name it.

    The caller then ends the process. Process 0, which all others depend on, waits a little for them to have heard.
    """
    if _joined:
        _joined.watch.leave(code, sentence)


def _wait_until_nobody_watches(run: _Joined) -> None:
    """Process 0 must not close its connection while somebody would still take that for a loss."""
    deadline = time.monotonic() + SHUTDOWN_SECONDS
    with contextlib.suppress(StoreError):
        if run.place.index:
            run.store.set(f"left/{run.place.index}", "")
            return
        while len(run.store.under("left")) < run.place.count - 1 and time.monotonic() < deadline:
            time.sleep(0.02)


def finish(timeout: float | None = None) -> None:
    """The normal end: waits until every process is here, then takes leave of all at once.

    Raises:
        HostLost: names who did not come.
    """
    global _joined
    if _joined is None:
        return
    exchange("finish", None, timeout)
    _joined.watch.stop()
    _wait_until_nobody_watches(_joined)
    import jax

    # A process that dies here can not harm a run that is done: no error of it counts, and there is a time limit.
    def shutdown() -> None:
        with contextlib.suppress(RuntimeError):
            jax.distributed.shutdown()

    ending = threading.Thread(target=shutdown, daemon=True)
    ending.start()
    ending.join(SHUTDOWN_SECONDS + 5)
    _joined = None
