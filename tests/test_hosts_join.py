"""Where a process's settings come from, and the roll call: who is missing, and whatever else can be wrong there."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import socket
import threading
import time

import pytest

from dsjax import cli, hosts
from dsjax.config import UserError
from dsjax.hosts import join

HERE = socket.gethostname()
TINY = str(pathlib.Path(__file__).parent.parent / "configs" / "tiny.py")


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


# ---------------------------------------------------------------- joining


def together(*places: join.Place, seconds: float = 2.0) -> list[object]:
    """What a roll call of threads brings each: names or an error."""

    def come(place: join.Place) -> object:
        try:
            call = join.roll_call(place, hosts.HostsConfig(join=seconds))
            call.close()
            return call.names
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(come, places))


def at(port: int, count: int, index: int) -> join.Place:
    return join.Place(f"localhost:{port}", count, index)


def test_roll_call() -> None:
    port = free_port()
    assert together(*(at(port, 4, i) for i in (3, 1, 0, 2))) == [[HERE] * 4] * 4


@pytest.mark.parametrize("lost", [{0}, {2}, {1, 3}, {0, 1}, set()])
def test_who_is_lost_after_the_roll_call_is_known_to_all(lost: set[int]) -> None:
    """Of those that are gone, the lower one is frozen, which only its silence shows."""
    port = free_port()

    def come(index: int) -> object:
        with contextlib.closing(join.roll_call(at(port, 4, index), hosts.HostsConfig(join=5.0))) as call:
            if index not in lost:
                time.sleep(0.2 * index)  # not everybody notices at once
                return call.who_is_lost(1.0)
            if index == min(lost):
                time.sleep(4)
        return None

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(come, range(4)))
    for index in set(range(4)) - lost:
        assert found[index] == ([0] if 0 in lost else sorted(lost))


def test_who_does_not_come_is_named_by_all() -> None:
    port = free_port()
    begin = time.monotonic()
    found = together(*(at(port, 4, i) for i in (0, 2)), seconds=1.5)
    for error in found:
        assert isinstance(error, hosts.HostLost)
        assert str(error).startswith(f"process 1 and process 3 did not join at localhost:{port} within 1.5 s"), error
    assert time.monotonic() - begin < 8


@pytest.mark.parametrize("place", ["localhost:{}", "no-such-host.invalid:{}"])
def test_nobody_at_the_address(place: str) -> None:
    address = place.format(free_port())
    (error,) = together(join.Place(address, 2, 1), seconds=1.0)
    assert isinstance(error, hosts.HostLost)
    assert f"could not reach process 0 at {address} within 1 s (" in str(error)


def test_the_address_of_process_0_leads_elsewhere() -> None:
    (error,) = together(join.Place("no-such-host.invalid:" + str(free_port()), 2, 0), seconds=1.0)
    assert isinstance(error, hosts.HostLost)
    assert str(error).startswith("process 0 could not reach itself at no-such-host.invalid")
    assert "--coordinator must name the host of process 0" in str(error)


def test_the_port_is_taken() -> None:
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as other:
        (error,) = together(at(other.getsockname()[1], 2, 0), seconds=0.5)
    assert isinstance(error, UserError)
    assert "can not listen on port" in str(error)


def test_somebody_else_answers() -> None:
    with socket.create_server(("localhost", 0)) as other:

        def serve() -> None:
            while True:
                try:
                    connection, _ = other.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        (error,) = together(at(other.getsockname()[1], 2, 1), seconds=1.0)
        other.shutdown(socket.SHUT_RDWR)
    assert isinstance(error, hosts.HostLost)
    assert "what answers is not dsjax" in str(error)


def test_processes_that_contradict_each_other() -> None:
    port = free_port()
    found = together(at(port, 3, 0), at(port, 3, 1), at(port, 3, 1), seconds=0.8)
    assert sum(isinstance(error, UserError) for error in found) == 1
    assert any(f"two processes have --process-id 1: one on {HERE}" in str(error) for error in found)
    port = free_port()
    found = together(at(port, 2, 0), at(port, 3, 1), seconds=0.8)
    assert str(found[1]) == f"--num-processes is 3 in process 1 ({HERE}), but 2 in process 0"


def test_noise_on_the_port_changes_nothing() -> None:
    port = free_port()

    def knock() -> None:
        for noise in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            b"{}\n",
            b"[" * 4000 + b"\n",
            b"x" * 10000,
            b'{"index": 1e999}\n',
        ):
            with socket.create_connection(("localhost", port), 5) as connection:
                connection.sendall(noise)

    def late() -> object:
        time.sleep(0.5)
        knock()
        return together(at(port, 2, 1), seconds=5)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(together, at(port, 2, 0), seconds=8), pool.submit(late)
        assert first.result() == second.result() == [[HERE] * 2]


# ---------------------------------------------------------------- settings


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No cluster around us, and no network."""
    for name in list(os.environ):
        if name in join.VARIABLES or name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    def no_network(*args: object, **options: object) -> None:
        raise AssertionError("a look-up")

    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.get_metadata", no_network)
    monkeypatch.setattr(socket, "create_connection", no_network)
    return monkeypatch


def place(*flags: object) -> join.Place | None:
    coordinator, count, index = flags or ("", None, None)
    return join.find_place(coordinator, count, index, hosts.HostsConfig())  # type: ignore[arg-type]


SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
}
JAX = {"JAX_COORDINATOR_ADDRESS": "h:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080"}
GKE |= {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "JAX_PLATFORMS": "tpu,cpu", "TPU_SKIP_MDS_QUERY": "1"}
ONE_ON_GKE = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "JAX_PLATFORMS": "tpu"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        (JAX, join.Place("h:1234", 2, 1)),
        (JAX | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (SLURM, join.Place("node3:61456", 2, 1, (0,))),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (OPEN_MPI, join.Place("10.96.0.1:62960", 4, 2, (2,))),
        (GKE, join.Place("localhost:8482", 4, 3)),
        (GKE | {"JAX_PLATFORMS": "cpu"}, None),
        (ONE_ON_GKE | {"TPU_SKIP_MDS_QUERY": "1"}, None),
    ],
    ids=["nothing", "pod", "jax", "jax, one", "slurm", "slurm, one", "open mpi", "gke", "gke on cpu", "gke, one host"],
)
def test_the_environment_says_where_we_are(clean, variables, expected) -> None:
    for name, value in variables.items():
        clean.setenv(name, value)
    clean.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", "TPU_WORKER_ID" in variables)
    begin = time.monotonic()
    found = place()
    if found and expected and "SLURM_JOB_ID" in variables:  # the port is made from the job's number
        expected = dataclasses.replace(expected, coordinator=found.coordinator)
        assert found.coordinator.startswith("node3:")
    if found and expected and "OMPI_COMM_WORLD_SIZE" in variables:
        expected = dataclasses.replace(expected, coordinator=found.coordinator)
        assert found.coordinator.startswith("10.96.0.1:")
    assert found == expected
    assert time.monotonic() - begin < 1


def test_a_tpu_slice_is_found_by_its_metadata(clean) -> None:
    metadata = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "x:0:127.0.0.1,x:1:127.0.0.2",
        "tpu-env": "A: '1'",
    }
    clean.setenv("JAX_PLATFORMS", "")
    clean.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    clean.setattr("jax._src.clusters.cloud_tpu_cluster.get_metadata", lambda key: (metadata[key], 200))
    assert place() == join.Place("127.0.0.1:8482", 2, 1)
    metadata["worker-network-endpoints"] = "x:0:127.0.0.1"
    assert place() is None, "one host"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("h:1", 2, None), "--coordinator and --num-processes given, but not --process-id"),
        (("", None, 0), "--process-id given, but not --coordinator and --num-processes"),
        (("h:1", 0, 0), "--num-processes is 0; it must be at least 1"),
        (("h:1", 2, 2), "--process-id is 2; it must be from 0 to 1"),
        (("h:1", 2, -1), "--process-id is -1; it must be from 0 to 1"),
        (("h", 2, 0), "'h'; it must be HOST:PORT"),
        (("h:0", 2, 0), "'h:0'; it must be HOST:PORT"),
        (("h:65536", 2, 0), "'h:65536'; it must be"),
        (("h:x", 2, 0), "'h:x'; it must be"),
        (("::1:80", 2, 0), "'::1:80'; it must be"),
        (("http://h:80", 2, 0), "'http://h:80'; it must be"),
    ],
)
def test_wrong_flags(clean, flags, sentence) -> None:
    with pytest.raises(UserError) as error:
        place(*flags)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (JAX | {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID is 'one'; it must be a whole number"),
        (JAX | {"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is 2; it must be from 0 to 1"),
        (JAX | {"JAX_COORDINATOR_ADDRESS": ""}, "but not JAX_COORDINATOR_ADDRESS"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "not JAX_NUM_PROCESSES and JAX_PROCESS_ID, and JAX detects no cluster"),
        ({"JAX_NUM_PROCESSES": "2"}, "has JAX_NUM_PROCESSES, but not JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID"),
        ({"JAX_PROCESS_ID": "1"}, "has JAX_PROCESS_ID, but not JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES"),
        (JAX | {"JAX_PROCESS_ID": ""}, "but not JAX_PROCESS_ID, and JAX detects no cluster; set all three or none"),
        (SLURM | {"SLURM_PROCID": "x"}, "not this process's place in it (ValueError"),
    ],
)
def test_a_wrong_environment(clean, variables, sentence) -> None:
    for name, value in variables.items():
        clean.setenv(name, value)
    with pytest.raises(UserError) as error:
        place()
    assert sentence in str(error.value)


def test_right_flags(clean) -> None:
    assert place("[::1]:1234", 2, 1) == join.Place("[::1]:1234", 2, 1)
    assert place("h:1234", 1, 0) is None, "one process starts nothing"
    assert join.split_address("[::1]:1234") == ("::1", 1234)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--coordinator", "h:1", "train.steps=3"], "--coordinator given, but not --num-processes and --process-id"),
        (["--num-processes", "two"], "--num-processes"),
        (["--join-timeout", "0"], "--join-timeout is 0; it must be a number of seconds above 0"),
        (["--stall-timeout", "nan"], "--stall-timeout is nan"),
    ],
)
def test_wrong_flags_on_the_command_line(clean, capsys, words, sentence) -> None:
    assert cli.run(["train", TINY, *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert sentence in said[0]


def test_the_command_line_ends_with_the_code_of_a_loss(capsys) -> None:
    words = ["--coordinator", f"localhost:{free_port()}", "--num-processes", "2", "--process-id", "1"]
    assert cli.run(["train", TINY, *words, "--join-timeout", "0.5"]) == hosts.EXIT_HOST_LOST == 75
    assert "dsjax: process 1 could not reach process 0 at localhost:" in capsys.readouterr().err
