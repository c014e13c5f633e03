"""Where the processes of a run are, and the roll call in which they find each other.

JAX's own way to connect can not say who is missing, and crashes if the port is taken (jaxlib 0.10.2). So process 0
first listens on the coordinator's port itself: every process comes, says who it is, and is told either the names of all
or what is wrong. Then the port is given to JAX, and everybody connects at once. The connections of the roll call stay
open until that is done: if it fails, they show who is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import selectors
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

from dsjax.config import UserError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class HostLost(Exception):
    """A process is gone, or did not come or answer in time; starting all again may help."""


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """Time limits, in seconds.

    Attributes:
        join: for all processes to come; a pod's hosts start minutes apart.
        period: between heartbeats.
        lost_after: a process without a heartbeat for so long is lost; it must exceed the longest pause of Python's
            threads, and ``lost_after + 2 * period + linger`` stay below the 30 s in which everybody must have ended.
        stall_after: a process that lives but makes no step for so long ends the run; it must exceed the longest
            compilation, evaluation and checkpoint.
        linger: how long process 0, which hosts the service, waits for the others to have heard of the end.
    """

    join: float = 300.0
    period: float = 1.0
    lost_after: float = 20.0
    stall_after: float = 1800.0
    linger: float = 3.0


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process is among the others; ``local_devices``: GPUs that are its own, None: all that it sees."""

    coordinator: str
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None


def title(process: int, names: list[str]) -> str:
    """How messages call a process."""
    return f"process {process} ({names[process]})" if process < len(names) else f"process {process}"


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT or [IPV6]:PORT.

    Raises:
        UserError: it is neither.
    """
    host, _, port = address.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else "" if ":" in host else host
    if not re.fullmatch(r"[^\s/\[\]]+", host) or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise UserError(
            f"the coordinator's address is {address!r}; it must be HOST:PORT of process 0, with a port from 1 to 65535"
        )
    return host, int(port)


# ---------------------------------------------------------------- which settings


def find_place(
    coordinator: str, num_processes: int | None, process_id: int | None, config: HostsConfig
) -> Place | None:
    """The place of this process; None: it is alone, and nothing is to be started.

    The flags decide; else ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``; else what JAX
    detects: Cloud TPU VM or GKE (also several slices), SLURM, Open MPI, or an indexed Kubernetes job.

    Raises:
        UserError: the settings are incomplete or wrong.
    """
    given = {"--coordinator": coordinator or None, "--num-processes": num_processes, "--process-id": process_id}
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == 3:
        values = [os.environ.get(name, "") for name in VARIABLES]
        # The first alone is known to JAX too, which then finds out the rest.
        return _from_variables(values) if all(values[1:]) else _from_cluster(config)
    if missing:
        has = [flag for flag in given if flag not in missing]
        raise UserError(f"{' and '.join(has)} given, but not {' and '.join(missing)}; give all three or none")
    return _checked(coordinator, num_processes, process_id, "--num-processes", "--process-id")


def _checked(coordinator: str, count: Any, index: Any, count_key: str, index_key: str) -> Place | None:
    if count < 1:
        raise UserError(f"{count_key} is {count}; it must be at least 1")
    if not 0 <= index < count:
        raise UserError(f"{index_key} is {index}; it must be from 0 to {count - 1}, since {count_key} is {count}")
    split_address(coordinator)
    return Place(coordinator, count, index) if count > 1 else None


def _from_variables(values: list[str]) -> Place | None:
    address, count, index = VARIABLES
    for name, value in zip((count, index), values[1:], strict=True):
        if not re.fullmatch(r"-?[0-9]{1,9}", value):
            raise UserError(f"the environment variable {name} is {value!r}; it must be a whole number")
    if not values[0] and int(values[1]) > 1:
        raise UserError(f"the environment has {count} and {index}, but not {address}; set all three or none")
    return _checked(values[0] or "localhost:1", int(values[1]), int(values[2]), count, index)


def _from_cluster(config: HostsConfig) -> Place | None:
    cluster = detect_cluster()
    if cluster is None:
        has = [name for name in VARIABLES if os.environ.get(name)]
        missing = [name for name in VARIABLES if name not in has]
        if has:
            raise UserError(
                f"the environment has {' and '.join(has)}, but not {' and '.join(missing)}, and JAX detects no"
                " cluster; set all three or none"
            )
        return None
    try:
        count = cluster.get_process_count()
        if count == 1:
            return None
        address = os.environ.get("JAX_COORDINATOR_ADDRESS") or cluster.get_coordinator_address(
            timeout_secs=int(config.join), override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
        )
        local = cluster.get_local_process_id() if cluster.name in ("slurm", "ompi") else None
        place = _checked(
            address, count, cluster.get_process_id(), "the cluster's number of processes", "its process id"
        )
    except UserError:
        raise
    except Exception as error:  # of many libraries
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"JAX detects a cluster ({cluster.__name__}), but not this process's place in it ({reason});"
            " give --coordinator, --num-processes and --process-id"
        ) from None
    given = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    return place and dataclasses.replace(place, local_devices=None if local is None or given else (local,))


def detect_cluster() -> Any:
    """JAX's class for the cluster that this process is in; None: it is in none, or alone.

    Only the environment is looked at, except on a Cloud TPU VM with TPUs, whose metadata server is there and answers.
    """
    from jax._src.clusters import ClusterEnv

    platforms = os.environ.get("JAX_PLATFORMS", "")
    for cluster in ClusterEnv._cluster_types:
        kind = cluster.__name__
        if cluster.opt_in_only_method:
            continue
        if "Tpu" in kind and platforms and "tpu" not in platforms.split(","):
            continue  # the TPU is there, but not used
        if kind == "GkeTpuCluster" and _is_alone_on_gke():
            return None  # JAX would ask a metadata server
        if kind == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ:
            continue  # a pod of its own
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without the package kubernetes, JAX warns
            if cluster.is_env_present():
                return cluster
    return None


def _is_alone_on_gke() -> bool:
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES"))
    return hosts is not None and "," not in hosts and "MEGASCALE_COORDINATOR_ADDRESS" not in os.environ


# ---------------------------------------------------------------- roll call


@dataclasses.dataclass
class RollCall:
    """Everybody has come; used until JAX has connected them, then closed.

    Attributes:
        names: the hosts of the processes.
        line: to process 0.
        visitors: on process 0, the other ends of all lines.
    """

    names: list[str]
    line: socket.socket
    visitors: dict[int, _Visitor] = dataclasses.field(default_factory=dict)

    def close(self) -> None:
        for connection in (self.line, *(visitor.connection for visitor in self.visitors.values())):
            with contextlib.suppress(OSError):
                connection.close()

    def who_is_lost(self, patience: float = 8.0) -> list[int]:
        """After connecting has failed, which it does for all: the processes that do not answer.

        Process 0 hears from everybody who is still there, and tells them; they notice the failure within a few
        seconds of each other, which is what the patience is for.
        """
        with contextlib.suppress(OSError):
            self.line.sendall(b'{"here": true}\n')
        if self.visitors:
            lost = self._collect(time.monotonic() + patience)
            for visitor in self.visitors.values():
                visitor.say({"lost": lost})
            return lost
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            for message in _messages(self.line, time.monotonic() + patience + 2):
                if "lost" in message:
                    return [int(process) for process in message["lost"]]
        return [0]

    def _collect(self, deadline: float) -> list[int]:
        waiting = dict(self.visitors)
        here: set[int] = set()
        with selectors.DefaultSelector() as ready:
            for process, visitor in waiting.items():
                ready.register(visitor.connection, selectors.EVENT_READ, process)
            while waiting and (left := deadline - time.monotonic()) > 0:
                for key, _ in ready.select(left):
                    with contextlib.suppress(OSError):
                        if waiting[key.data].connection.recv(4096):
                            here.add(key.data)
                    ready.unregister(key.fileobj)
                    del waiting[key.data]
        return [process for process in self.visitors if process not in here]


def roll_call(place: Place, config: HostsConfig) -> RollCall:
    """Waits until all processes have come.

    Raises:
        UserError: the port is taken, or another process contradicts this one.
        HostLost: names who has not come in time, or says that process 0 can not be reached.
    """
    if place.index:
        return _come(place, config)
    listener = _listen(place, min(config.join, 10.0))
    visitors: dict[int, _Visitor] = {}
    caller = threading.Thread(target=_call, args=(listener, place, config.join, visitors), daemon=True)
    caller.start()
    call = _come(place, config)  # also shows that the address leads to here
    caller.join(10.0)
    call.visitors = dict(sorted(visitors.items()))
    return call


def _listen(place: Place, patience: float) -> socket.socket:
    """Process 0's end; waits a little for the port, which a run that was just ended may still hold."""
    _, port = split_address(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or place.coordinator)
    deadline = time.monotonic() + patience
    while True:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
            return socket.create_server(("", port), backlog=1024)
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process 0 can not listen on port {port} of this host ({error.strerror or error});"
                    " --coordinator needs a free port"
                ) from None
            time.sleep(0.2)


class _Visitor:
    """A connection at the roll call, and who it is, once it has said so."""

    def __init__(self, connection: socket.socket):
        self.connection, self.received = connection, b""
        self.index: int | None = None
        self.host = ""

    def say(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")


def _call(listener: socket.socket, place: Place, seconds: float, present: dict[int, _Visitor]) -> None:
    """The roll call itself, on a thread of process 0; everybody hears once a second who is missing.

    Leaves in ``present`` who is there, with their connections open if that is everybody.
    """
    deadline, next_word = time.monotonic() + seconds, 0.0
    with listener, selectors.DefaultSelector() as ready:
        ready.register(listener, selectors.EVENT_READ)
        while len(present) < place.count:
            for key, _ in ready.select(0.1):
                if key.data is None:
                    with contextlib.suppress(OSError):  # gone again
                        connection, _ = listener.accept()
                        connection.settimeout(5.0)
                        ready.register(connection, selectors.EVENT_READ, _Visitor(connection))
                elif not _hear(key.data, place, present):
                    ready.unregister(key.data.connection)
                    key.data.connection.close()
                    if key.data in present.values():
                        del present[key.data.index]
            now, missing = time.monotonic(), [i for i in range(place.count) if i not in present]
            if missing and (now > next_word or now > deadline):
                for visitor in present.values():
                    visitor.say({"missing": missing, "over": now > deadline})
                next_word = now + 1.0
            if now > deadline:
                break
        visitors = [key.data for key in ready.get_map().values() if key.data is not None]
    complete = len(present) == place.count
    for visitor in present.values() if complete else ():
        visitor.say({"hosts": [present[i].host for i in range(place.count)]})
    for visitor in visitors:
        if not (complete and visitor in present.values()):
            visitor.connection.close()


def _hear(visitor: _Visitor, place: Place, present: dict[int, _Visitor]) -> bool:
    """Takes in what somebody says; False: close the connection."""
    try:
        some = visitor.connection.recv(4096)
    except OSError:
        return False
    visitor.received += some
    if not some or len(visitor.received) > 4096:
        return False
    if b"\n" not in visitor.received or visitor.index is not None:
        return True
    try:
        said = json.loads(visitor.received)
        index, count, host = int(said["index"]), int(said["count"]), str(said["host"])[:253]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # somebody else's knock
        return False
    refusal = ""
    if count != place.count:
        refusal = f"--num-processes is {count} in process {index} ({host}), but {place.count} in process 0"
    elif not 0 <= index < count:
        refusal = f"--process-id is {index}; it must be from 0 to {count - 1}"
    elif index in present:
        refusal = f"two processes have --process-id {index}: one on {present[index].host}, one on {host}"
    if refusal:
        visitor.say({"refused": refusal})
        return False
    visitor.index, visitor.host = index, host
    present[index] = visitor
    return True


def _come(place: Place, config: HostsConfig) -> RollCall:
    """Answers the roll call; has a little more patience than process 0, which says who is missing."""
    host, port = split_address(place.coordinator)
    deadline, reason, missing = time.monotonic() + config.join + 2, "no connection", [0]
    hello = json.dumps({"index": place.index, "count": place.count, "host": socket.gethostname()})
    while (left := deadline - time.monotonic()) > 0:
        try:
            with contextlib.ExitStack() as closing:
                connection = closing.enter_context(socket.create_connection((host, port), min(left, 5.0)))
                connection.sendall(hello.encode() + b"\n")
                for message in _messages(connection, deadline):
                    if "hosts" in message:
                        closing.pop_all()
                        return RollCall([str(name) for name in message["hosts"]], connection)
                    if "refused" in message:
                        raise UserError(str(message["refused"]))
                    missing = [int(process) for process in message["missing"]]
                    if message["over"]:
                        deadline = 0.0
                        break
            reason = "it closed the connection" if missing == [0] else "process 0 has gone"
        except OSError as error:
            reason = error.strerror or str(error)
        except (ValueError, KeyError, TypeError):
            reason = "what answers is not dsjax"
        time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))
    if 0 not in missing:
        who = " and ".join(f"process {process}" for process in missing)
        raise HostLost(f"{who} did not join at {place.coordinator} within {config.join:g} s")
    goal = "process 0" if place.index else "itself"
    raise HostLost(
        f"process {place.index} could not reach {goal} at {place.coordinator} within {config.join:g} s ({reason});"
        " --coordinator must name the host of process 0 and a free port of it"
    )


def _messages(connection: socket.socket, deadline: float) -> Iterator[dict[str, Any]]:
    """Lines of JSON, until the other end closes or the time is up."""
    received = b""
    while (left := deadline - time.monotonic()) > 0:
        connection.settimeout(min(left, 1.0))
        try:
            some = connection.recv(65536)
        except TimeoutError:
            continue
        if not some:
            return
        *lines, received = (received + some).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if not isinstance(message, dict):
                raise ValueError("not a message")
            yield message
        if len(received) > 10**6:
            raise ValueError("not a message")
