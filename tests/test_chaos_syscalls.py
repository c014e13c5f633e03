"""The tool that stops and breaks system calls, on children of a few lines; and a few crash points of a save."""

from __future__ import annotations

import errno
import pathlib
import platform
import sys
import textwrap
from collections.abc import Iterator

import pytest
from chaos import crash_points, disk
from chaos.durability import Rules, not_durable
from chaos.syscalls import WRITES, Fault, Trace
from chaos.traced import Traced

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="ptrace as Linux has it"
)

# Each line changes one thing in the folder that is watched.
STEPS = """
    a = os.open("a", os.O_WRONLY | os.O_CREAT)
    os.write(a, b"12345678")
    os.fsync(a)
    os.mkdir("sub")
    os.rename("a", "sub/b")
    os.writev(a, [b"abc", b"", b"defgh"])
    os.ftruncate(a, 10)
    os.unlink("sub/b")
    os.rmdir("sub")
"""
NAMES = ["openat", "write", "fsync", "mkdir", "rename", "writev", "ftruncate", "unlink", "rmdir"]
LEFT: list[dict[str, int]] = [  # by the first n of them: sizes of files
    {},
    {"a": 0},
    {"a": 8},
    {"a": 8},
    {"a": 8},
    {"sub/b": 8},
    {"sub/b": 16},
    {"sub/b": 10},
    {},
    {},
]


@pytest.fixture(scope="module")
def traced() -> Iterator[Traced]:
    with Traced() as tracing:
        yield tracing


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    inside = tmp_path / "watched"
    inside.mkdir()
    return inside


def play(traced: Traced, folder: pathlib.Path, code: str, fault: Fault | None = None, seconds: float = 20) -> Trace:
    """Runs Python code in the folder."""
    program = "import os, signal, threading, time, subprocess, sys, ctypes\n" + textwrap.dedent(code)
    words = [sys.executable, "-S", "-c", program]
    return traced.run("command", folder, fault, seconds=seconds, words=words, cwd=str(folder))


def sizes(folder: pathlib.Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def arm_name(name: str) -> str:
    """On aarch64 there are only the newer calls."""
    newer = {"mkdir": "mkdirat", "rename": "renameat", "unlink": "unlinkat", "rmdir": "unlinkat"}
    return name if platform.machine() == "x86_64" else newer.get(name, name)


# ---------------------------------------------------------------- what is seen


def test_every_call_is_seen_with_its_file_size_and_result(traced: Traced, folder: pathlib.Path) -> None:
    trace = play(traced, folder, STEPS)
    assert (trace.code, trace.hit, trace.timed_out, trace.said) == (0, None, False, "")
    assert [call.name for call in trace.calls] == [arm_name(name) for name in NAMES]
    made, written, synced, folder_made, renamed, vector, cut, *_ = trace.calls
    assert (written.path, written.size, written.result) == (str(folder / "a"), 8, 8)
    assert (renamed.path, renamed.to) == (str(folder / "a"), str(folder / "sub" / "b"))
    assert (vector.path, vector.size, vector.result) == (str(folder / "sub" / "b"), 8, 8)
    assert (made.result or 0) > 2
    assert synced.result == folder_made.result == cut.result == 0
    assert all(before.ended < after.begun for before, after in zip(trace.calls, trace.calls[1:], strict=False))


def test_reading_and_other_folders_are_not_seen(traced: Traced, folder: pathlib.Path) -> None:
    (folder / "there").write_text("text")
    beside = folder.parent / "watched-not"  # its name begins like that of the watched one
    trace = play(traced, folder, f"open('there').read(); os.listdir(); os.mkdir({str(beside)!r}); print('done')")
    assert beside.is_dir()
    assert trace.said == "done\n"
    assert trace.calls == []


def test_threads_and_child_processes_are_seen(traced: Traced, folder: pathlib.Path) -> None:
    code = """
    threads = [threading.Thread(target=lambda n=n: open(f"t{n}", "w").write("x")) for n in range(5)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    if not os.fork():
        open("forked", "w").write("x")
        os._exit(0)
    os.wait()
    subprocess.run([sys.executable, "-S", "-c", "open('spawned', 'w').write('x')"], check=True)
    """
    trace = play(traced, folder, code)
    assert trace.code == 0, trace.said
    written = {pathlib.Path(call.path).name: call.thread for call in trace.calls if call.name == "write"}
    assert sorted(written) == ["forked", "spawned", "t0", "t1", "t2", "t3", "t4"]
    assert len(set(written.values())) >= 3  # a thread's number may be used again once it has ended


def test_paths_relative_to_a_folder_and_newer_calls_are_seen(traced: Traced, folder: pathlib.Path) -> None:
    code = """
    import mmap
    libc = ctypes.CDLL(None, use_errno=True)
    os.mkdir("sub")
    sub = os.open("sub", os.O_RDONLY)
    file = os.open("x", os.O_RDWR | os.O_CREAT, dir_fd=sub)
    os.truncate("sub/x", 5)
    mapped = mmap.mmap(file, 5)
    how = (ctypes.c_ulong * 3)(os.O_WRONLY | os.O_CREAT, 0o600, 0)
    assert libc.syscall(437, sub, b"../y", how, 24) > 0
    assert libc.syscall(425, 8, None) == -1 and ctypes.get_errno() == 38  # io_uring is refused
    os.link("sub/x", "z")
    os.copy_file_range(file, os.open("w", os.O_WRONLY | os.O_CREAT), 5)
    """
    trace = play(traced, folder, code)
    assert trace.code == 0, trace.said
    seen = [(call.name.removesuffix("at"), str(pathlib.Path(call.to or call.path))) for call in trace.calls]
    names = ("mkdir", "open", "truncate", "mmap", "openat2", "link", "open", "copy_file_range")
    files = ("sub", "sub/x", "sub/x", "sub/x", "y", "z", "w", "w")
    assert seen == [(name, str(folder / file)) for name, file in zip(names, files, strict=True)]


def test_signals_reach_the_child_and_a_hanging_one_is_killed(traced: Traced, folder: pathlib.Path) -> None:
    code = """
    signal.signal(signal.SIGUSR1, lambda *_: print("got it", flush=True))
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=time.sleep, args=(60,)).start()
    time.sleep(60)
    """
    trace = play(traced, folder, code, seconds=0.5)
    assert trace.said == "got it\n"
    assert (trace.timed_out, trace.code) == (True, -9)
    assert 0.4 < trace.seconds < 10


# ---------------------------------------------------------------- what is done


@pytest.mark.parametrize("how", ["kill", "kill after"])
def test_the_nth_call_is_the_last(traced: Traced, folder: pathlib.Path, how: str) -> None:
    for number in range(1, len(NAMES) + 2):
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        trace = play(traced, folder, STEPS, Fault(number, how))
        happened = number - 1 if how == "kill" else number
        if number <= len(NAMES):
            assert (trace.code, trace.hit) == (-9, number - 1), number
        else:  # the control: it is never reached
            assert (trace.code, trace.hit, happened) == (0, None, happened)
        assert sizes(folder) == LEFT[min(happened, len(NAMES))], number
        assert (folder / "sub").exists() == (4 <= happened < 9), number


@pytest.mark.parametrize(("name", "left"), [("write", {"a": 4}), ("writev", {"sub/b": 12})])
def test_half_of_a_write_happens(traced: Traced, folder: pathlib.Path, name: str, left: dict[str, int]) -> None:
    trace = play(traced, folder, STEPS, Fault(1, "half", names=(name,)))
    assert trace.code == -9
    assert sizes(folder) == left
    assert trace.calls[-1].result == 4


ATTEMPTS = """
    for number in range(4):
        try:
            with open(f"f{number}", "wb", 0) as file:
                file.write(b"12345678")
        except OSError as error:
            print(number, error.errno, end=" ")
"""


@pytest.mark.parametrize(
    ("fault", "said", "left"),
    [
        (Fault(99, "error", errno.ENOSPC), "", 4),
        (Fault(2, "error", errno.ENOSPC, names=WRITES), "1 28 ", 3),
        (Fault(2, "error", errno.EIO, names=WRITES, onward=True), "1 5 2 5 3 5 ", 1),
        (Fault(3, "error", errno.EROFS), "1 30 ", 3),  # the second open
    ],
)
def test_a_call_fails_without_happening(
    traced: Traced, folder: pathlib.Path, fault: Fault, said: str, left: int
) -> None:
    trace = play(traced, folder, ATTEMPTS, fault)
    assert (trace.code, trace.said) == (0, said)
    assert sum(size == 8 for size in sizes(folder).values()) == left
    failed = [call.result for call in trace.calls if (call.result or 0) < 0]
    assert failed == [-fault.code] * said.count(f" {fault.code} ")


def test_a_fault_keeps_to_its_files(traced: Traced, folder: pathlib.Path) -> None:
    fails = Fault(1, "error", errno.ENOSPC, onward=True, under=str(folder / "f1"))
    assert play(traced, folder, ATTEMPTS, fails).said == "1 28 "
    beside = Fault(1, "error", errno.ENOSPC, onward=True, beside=str(folder / "f1"))
    assert play(traced, folder, ATTEMPTS, beside).said == "0 28 2 28 3 28 "


def test_another_thread_does_not_get_further_than_the_kill(traced: Traced, folder: pathlib.Path) -> None:
    code = """
    def write(name):
        with open(name, "wb", 0) as file:
            for _ in range(200):
                file.write(b"x")
    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    """
    trace = play(traced, folder, code, Fault(100, names=("write",)))
    assert trace.code == -9
    # Those under way in other threads may have happened, as when the power goes.
    assert 96 <= sum(sizes(folder).values()) <= 99


# ---------------------------------------------------------------- power loss

COMMIT = """
    def sync(path):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    os.mkdir("new")
    with open("new/a", "wb") as file:
        file.write(b"x"); file.flush()
        os.fsync(file.fileno())  # a
    sync("new")  # its names
    os.rename("new", "done")
    sync(".")  # the commit
    os.unlink("old")
"""


@pytest.mark.parametrize(
    ("leave_out", "put_in", "wrong"),
    [
        ("", "", ""),
        ("# a", "", "new/a was not fsynced between its last write and the commit"),
        ("# its names", "", "new was not fsynced between its last open"),
        ("# the commit", "", "the folder of the checkpoints was not fsynced after the commit"),
        ("", "open('new/a', 'ab').write(b'y')", "new/a was not fsynced between its last write and the commit"),
        ("", "os.unlink('done/a')", "done/a went (unlink"),
        ("", "open('done/a', 'ab').write(b'y')", "done/a was changed (open"),
        ("# the commit", "os.unlink('old'); open('old', 'w'); sync('.')", "old went (unlink"),
    ],
)
def test_a_missing_or_late_fsync_is_found(
    traced: Traced, folder: pathlib.Path, leave_out: str, put_in: str, wrong: str
) -> None:
    lines = [line for line in COMMIT.splitlines() if not (leave_out and leave_out in line)]
    place = next(i for i, line in enumerate(lines) if "os.rename" in line) + ("done" in put_in or "old" in put_in)
    lines.insert(place, f"    {put_in}")
    (folder / "old").write_text("")
    trace = play(traced, folder, "\n".join(lines))
    assert trace.code == 0, trace.said
    checked, found = not_durable(trace.calls, Rules(folder, folder / "done"))
    assert checked == 3
    if wrong:
        assert any(line.startswith(wrong) for line in found), found
    else:
        assert found == []


# ---------------------------------------------------------------- a save


def test_a_save_stopped_anywhere_leaves_the_old_step_or_the_new_one() -> None:
    goal = crash_points.run(8)
    assert 6 <= goal.n <= 8  # threads make a save a few calls shorter or longer
    assert goal.failures == ()


def test_it_would_be_seen_if_steps_were_written_in_place() -> None:
    goal = crash_points.run(4, mutant="written over the last step, not verified", scenes=crash_points.SCENES[:1])
    assert any("is a mixture" in line or "gone" in line or "could not be read" in line for line in goal.failures)


def test_a_step_is_on_the_disk_before_it_is_committed() -> None:
    goal = crash_points.power()
    assert goal.n >= 40
    assert goal.failures == ()
    assert crash_points.power(mutant="no fsync", scenes=crash_points.SCENES[:1]).failures


@pytest.mark.slow
def test_a_new_run_is_on_the_disk_when_its_first_step_is_committed() -> None:
    goal = disk.power()
    assert goal.n >= 20
    assert goal.failures == ()
    assert disk.power(mutant="no fsync").failures


@pytest.mark.slow
def test_an_error_of_the_disk_is_one_sentence_and_harms_no_older_step() -> None:
    goal = disk.run(16)
    assert 12 <= goal.n <= 16
    assert goal.failures == ()
    for mutant in ("failed saves are not told", "errors are raised as they are"):
        assert disk.run(6, mutant=mutant, places=disk.PLACES[:1]).failures
