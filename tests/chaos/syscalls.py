"""Records, stops or breaks the system calls by which a process changes files: Linux, ptrace and seccomp, no compiler.

    with Traced() as traced:
        trace = traced.run("command", folder, Fault(3, "error", errno.ENOSPC), words=["cp", "a", "b"])

The watched process puts a seccomp filter on itself that hands the calls which change files, and only those, to the
tracer: everything else runs at full speed, all threads and child processes are seen, C++ ones too. Not seen: changes by
``ioctl`` (``FICLONE``) and through memory maps (the map itself is). io_uring is refused, so that nothing evades by it.

:mod:`chaos.traced` has ``Traced``.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import os
import pathlib
import platform
import signal
import struct
import time
from collections.abc import Callable

# name, number on x86-64, on aarch64 (-1: none), and where its files are: f0 a descriptor in argument 0, p0 a path,
# a01 a path in argument 1 relative to the folder of descriptor 0. Last: which argument must share a bit with what
# for the call to change a file.
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
MAP_SHARED, PROT_WRITE = 1, 2
_CALLS = """
open 2 -1 p0 | openat 257 56 a01 | openat2 437 437 a01 | creat 85 -1 p0 | mmap 9 222 f4
write 1 64 f0 | pwrite64 18 68 f0 | writev 20 66 f0 | pwritev 296 70 f0 | pwritev2 328 287 f0
copy_file_range 326 285 f2 | sendfile 40 71 f0 | splice 275 76 f2
fsync 74 82 f0 | fdatasync 75 83 f0 | sync_file_range 277 84 f0 | syncfs 306 267 f0
truncate 76 45 p0 | ftruncate 77 46 f0 | fallocate 285 47 f0
rename 82 -1 p0 p1 | renameat 264 38 a01 a23 | renameat2 316 276 a01 a23
link 86 -1 p0 p1 | linkat 265 37 a01 a23 | symlink 88 -1 p1 | symlinkat 266 36 a12
unlink 87 -1 p0 | unlinkat 263 35 a01 | rmdir 84 -1 p0 | mkdir 83 -1 p0 | mkdirat 258 34 a01
mknod 133 -1 p0 | mknodat 259 33 a01 | utimensat 280 88 a01
chmod 90 -1 p0 | fchmod 91 52 f0 | fchmodat 268 53 a01 | chown 92 -1 p0 | fchown 93 55 f0 | fchownat 260 54 a01
"""
_ONLY_IF = {"open": (1, WRITING), "openat": (2, WRITING), "mmap": (3, MAP_SHARED)}
_SIZE = {"write": 2, "pwrite64": 2, "copy_file_range": 4, "sendfile": 3, "splice": 4, "truncate": 1, "ftruncate": 1}
_VECTORS = ("writev", "pwritev", "pwritev2")
WRITES = ("write", "pwrite64", *_VECTORS, "copy_file_range", "sendfile", "splice")
SYNCS = ("fsync", "fdatasync", "sync_file_range", "syncfs")

_X86 = platform.machine() == "x86_64"
_ARCH, _SECCOMP, _IO_URING_SETUP = (0xC000003E, 317, 425) if _X86 else (0xC00000B7, 277, 425)
_ARGUMENTS_X86 = (112, 104, 96, 56, 72, 64)  # where PTRACE_POKEUSER finds rdi, rsi, rdx, r10, r8, r9
_RESULT_X86, _NUMBER_X86 = 80, 120  # rax, orig_rax

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_CONT, _POKEUSER, _GETREGSET, _SETREGSET = 7, 6, 0x4204, 0x4205
_SYSCALL, _SEIZE, _LISTEN, _GET_SYSCALL_INFO = 24, 0x4206, 0x4208, 0x420E
_OPTIONS = 0x01 | 0x02 | 0x04 | 0x08 | 0x80 | 0x100000  # TRACESYSGOOD FORK VFORK CLONE SECCOMP EXITKILL
_EVENT_SECCOMP, _EVENT_STOP, _WALL = 7, 128, 0x40000000


def _table() -> dict[int, tuple[str, tuple[str, ...]]]:
    """Number -> name and places, for this machine."""
    found = {}
    for entry in _CALLS.replace("\n", "|").split("|"):
        if words := entry.split():
            found[int(words[1 if _X86 else 2])] = (words[0], tuple(words[3:]))
    found.pop(-1, None)
    return found


_BY_NUMBER = _table()


@dataclasses.dataclass(frozen=True)
class Fault:
    """What to do to the calls that change files.

    Attributes:
        at: which one of those that count, from 1.
        how: ``kill`` the process before the call happens, ``kill after`` it, ``half``: write half of its bytes, then
            kill, or ``error``: the call does not happen and fails with ``code``.
        code: of ``errno``.
        onward: also all that follow it (a disk that stays full).
        names: only these calls count; empty: all.
        under: only calls in this folder (or on this file) count; empty: in all of the traced one.
        beside: calls in this folder do not count.
    """

    at: int
    how: str = "kill"
    code: int = 0
    onward: bool = False
    names: tuple[str, ...] = ()
    under: str = ""
    beside: str = ""


@dataclasses.dataclass
class Call:
    """One call that changes files.

    Attributes:
        name: of the system call.
        path: of the file or folder.
        to: the second one of a rename or link.
        size: bytes asked to write, or the new length.
        flags: of an open.
        thread: who called.
        begun: its place in the order of all beginnings and ends.
        ended: likewise; 0 if it has not ended.
        result: what it returned, -errno for an error; None if it has not ended.
        at: seconds since the trace began.
    """

    name: str
    path: str
    to: str = ""
    size: int = 0
    flags: int = 0
    thread: int = 0
    begun: int = 0
    ended: int = 0
    result: int | None = None
    at: float = 0.0


@dataclasses.dataclass
class Trace:
    """What was seen of a process.

    Attributes:
        calls: in the order in which they began.
        code: exit code; -9 if killed.
        hit: the index in ``calls`` of the first one that the fault was done to; None: the process never got there.
        timed_out: it was killed because it took too long.
        seconds: that it ran.
        seconds_after: that it ran after the fault.
        said: its standard output and error.
    """

    calls: list[Call]
    code: int
    hit: int | None
    timed_out: bool
    seconds: float
    seconds_after: float
    said: str = ""


# ---------------------------------------------------------------- in the watched process


def watch_me() -> None:
    """From here on the calls of this process that change files go to its tracer; without one they fail."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    code = _filter()
    program = Program(len(code) // 8, code)
    _libc.prctl(38, 1, 0, 0, 0)  # no new privileges: who is not root may filter, too
    failed = _libc.syscall(_SECCOMP, 1, 1, ctypes.byref(program))  # 1: a filter, 1: for all threads
    if failed:
        raise OSError(ctypes.get_errno(), f"no seccomp filter ({failed})")


def _filter() -> bytes:
    """The seccomp program: hand over what is in the table, refuse io_uring, let everything else through."""
    allow, trace, refuse = 0x7FFF0000, 0x7FF00000, 0x00050000 | errno.ENOSYS
    load, equal, common, give = 0x20, 0x15, 0x45, 0x06  # of classic BPF

    program = [(load, 0, 0, 4), (equal, 1, 0, _ARCH), (give, 0, 0, allow), (load, 0, 0, 0)]
    program += [(equal, 0, 1, _IO_URING_SETUP), (give, 0, 0, refuse)]
    for number, (name, _) in _BY_NUMBER.items():
        if name in _ONLY_IF:
            argument, bits = _ONLY_IF[name]
            program += [(equal, 0, 4, number), (load, 0, 0, 16 + 8 * argument), (common, 0, 1, bits)]
            program += [(give, 0, 0, trace), (give, 0, 0, allow)]
        else:
            program += [(equal, 0, 1, number), (give, 0, 0, trace)]
    program.append((give, 0, 0, allow))
    return b"".join(struct.pack("HBBI", *line) for line in program)


# ---------------------------------------------------------------- the tracer


class Tracer:
    """Follows a process and all that it starts. It waits for every child of its own process: let there be no others."""

    def __init__(self, pid: int, folder: pathlib.Path, fault: Fault | None, seconds: float):
        self._pid, self._folder, self._fault, self._limit = pid, str(folder.resolve()), fault, seconds
        self._under = str(pathlib.Path(fault.under).resolve()) if fault and fault.under else self._folder
        self._beside = str(pathlib.Path(fault.beside).resolve()) if fault and fault.beside else ""
        self._calls: list[Call] = []
        self._open: dict[int, tuple[Call, bool]] = {}  # thread -> its call under way; whether to kill after it
        self._threads = {pid}
        self._clock = self._counted = 0
        self._hit: int | None = None
        self._timed_out = False
        self._begin = self._hit_at = time.perf_counter()

    def follow(self, release: Callable[[], None]) -> Trace:
        """Attaches, lets the process go on by ``release``, and watches until all of it has ended."""
        if _libc.ptrace(_SEIZE, self._pid, None, ctypes.c_void_p(_OPTIONS)):
            code = ctypes.get_errno()
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            raise OSError(code, f"can not trace: {os.strerror(code)}")
        signal.signal(signal.SIGALRM, self._out_of_time)
        signal.setitimer(signal.ITIMER_REAL, self._limit, 1.0)
        release()
        code, end = 0, self._begin
        try:
            while True:
                tid, status = os.waitpid(-1, _WALL)
                if os.WIFSTOPPED(status):
                    self._threads.add(tid)
                    self._stopped(tid, status)
                    continue
                self._threads.discard(tid)
                if tid == self._pid:
                    code, end = os.waitstatus_to_exitcode(status), time.perf_counter()
        except ChildProcessError:  # nothing is left
            signal.setitimer(signal.ITIMER_REAL, 0)
        after = end - self._hit_at if self._hit is not None else 0.0
        return Trace(self._calls, code, self._hit, self._timed_out, end - self._begin, after)

    def _out_of_time(self, *_: object) -> None:
        self._timed_out = True
        self._kill()

    def _kill(self) -> None:
        for thread in self._threads:
            with contextlib.suppress(ProcessLookupError):
                os.kill(thread, signal.SIGKILL)

    def _stopped(self, tid: int, status: int) -> None:
        number, event = os.WSTOPSIG(status), status >> 16
        if event == _EVENT_SECCOMP:
            self._entered(tid)
        elif number == signal.SIGTRAP | 0x80:
            self._left(tid)
        elif event == _EVENT_STOP and number in (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
            self._go(tid, _LISTEN)  # a job-control stop of the whole process, until SIGCONT
        else:
            self._go(tid, _CONT, 0 if event else number)

    def _go(self, tid: int, request: int, number: int = 0) -> None:
        _libc.ptrace(request, tid, None, ctypes.c_void_p(number))  # fails if it was killed meanwhile: the wait tells

    def _entered(self, tid: int) -> None:
        number, arguments = _entry(tid)
        call = self._described(tid, number, arguments)
        if call is None:
            self._go(tid, _CONT)
            return
        self._clock += 1
        call.begun, call.at, call.thread = self._clock, time.perf_counter() - self._begin, tid
        self._calls.append(call)
        how = self._what_to_do(call)
        if how == "kill":
            self._kill()
        elif how == "error":
            _skip(tid, -self._fault.code)  # type: ignore[union-attr]
            self._ended(call, -self._fault.code)  # type: ignore[union-attr]
            self._go(tid, _CONT)
        else:
            if how == "half":
                _halve(tid, call.name, arguments)
            self._open[tid] = call, bool(how)
            self._go(tid, _SYSCALL)

    def _what_to_do(self, call: Call) -> str:
        fault = self._fault
        if fault is None or not (_is_in(call.path, self._under) or _is_in(call.to, self._under)):
            return ""
        if self._beside and _is_in(call.path, self._beside):
            return ""
        if fault.names and call.name not in fault.names:
            return ""
        self._counted += 1
        if not (self._counted == fault.at or (fault.onward and self._counted > fault.at)):
            return ""
        if self._hit is None:
            self._hit, self._hit_at = len(self._calls) - 1, time.perf_counter()
        return "kill" if fault.how == "half" and call.name not in WRITES else fault.how

    def _left(self, tid: int) -> None:
        call, kill = self._open.pop(tid, (None, False))
        if call is not None:
            self._ended(call, _exit_value(tid))
        if kill:
            self._kill()
        else:
            self._go(tid, _CONT)

    def _ended(self, call: Call, result: int) -> None:
        self._clock += 1
        call.ended, call.result = self._clock, result

    def _described(self, tid: int, number: int, arguments: tuple[int, ...]) -> Call | None:
        """The call, if it changes something in the folder."""
        if number not in _BY_NUMBER:
            return None
        name, places = _BY_NUMBER[number]
        paths = [_path(tid, place, arguments) for place in places]
        if not any(_is_in(path, self._folder) for path in paths):
            return None
        flags = arguments[_ONLY_IF[name][0]] if name in _ONLY_IF else WRITING if name == "creat" else 0
        if name == "openat2":
            flags = struct.unpack("Q", _read(tid, arguments[2], 8))[0]
            if not flags & WRITING:
                return None
        if name == "mmap" and not arguments[2] & PROT_WRITE:
            return None
        size = arguments[_SIZE[name]] if name in _SIZE else 0
        if name in _VECTORS:
            size = sum(length for _, length in _vector(tid, arguments))
        return Call(name, paths[0], paths[1] if paths[1:] else "", size, flags)


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def _path(tid: int, place: str, arguments: tuple[int, ...]) -> str:
    process = pathlib.Path(f"/proc/{tid}")
    numbers = [int(digit) for digit in place[1:]]
    with contextlib.suppress(OSError):
        if place[0] == "f":
            return _link(process / "fd" / str(_descriptor(arguments[numbers[0]])))
        relative_to = "cwd"
        if place[0] == "a" and _descriptor(arguments[numbers[0]]) >= 0:
            relative_to = f"fd/{_descriptor(arguments[numbers[0]])}"
        text = _read(tid, arguments[numbers[-1]], 4096).split(b"\0")[0] if arguments[numbers[-1]] else b""
        path = pathlib.Path(_link(process / relative_to), os.fsdecode(text))
        return str(path.parent.resolve() / path.name)
    return ""


def _descriptor(argument: int) -> int:
    return ctypes.c_int(argument & 0xFFFFFFFF).value


def _link(path: pathlib.Path) -> str:
    return str(path.readlink()).removesuffix(" (deleted)")


# ---------------------------------------------------------------- registers and memory


def _entry(tid: int) -> tuple[int, tuple[int, ...]]:
    """Number and arguments of the call at whose beginning a thread stands."""
    told = ctypes.create_string_buffer(88)
    _libc.ptrace(_GET_SYSCALL_INFO, tid, ctypes.c_void_p(88), told)
    number, *arguments = struct.unpack_from("7Q", told.raw, 24)
    return number, tuple(arguments)


def _exit_value(tid: int) -> int:
    told = ctypes.create_string_buffer(88)
    _libc.ptrace(_GET_SYSCALL_INFO, tid, ctypes.c_void_p(88), told)
    return struct.unpack_from("q", told.raw, 24)[0]


def _skip(tid: int, result: int) -> None:
    """The call does not happen and returns ``result``."""
    if _X86:
        _poke(tid, _NUMBER_X86, -1)
        _poke(tid, _RESULT_X86, result)
        return
    _regset(_SETREGSET, tid, 0x404, ctypes.create_string_buffer(struct.pack("i", -1), 4))
    _set_register_arm(tid, 0, result)


def _halve(tid: int, name: str, arguments: tuple[int, ...]) -> None:
    """Half of the bytes are written."""
    if name in _VECTORS:
        left = sum(length for _, length in _vector(tid, arguments)) // 2
        memory = os.open(f"/proc/{tid}/mem", os.O_RDWR)
        for number, (_, length) in enumerate(_vector(tid, arguments)):
            os.pwrite(memory, struct.pack("Q", min(left, length)), arguments[1] + 16 * number + 8)
            left -= min(left, length)
        os.close(memory)
        return
    place = _SIZE[name]
    if _X86:
        _poke(tid, _ARGUMENTS_X86[place], arguments[place] // 2)
    else:
        _set_register_arm(tid, place, arguments[place] // 2)


def _poke(tid: int, offset: int, value: int) -> None:
    _libc.ptrace(_POKEUSER, tid, ctypes.c_void_p(offset), ctypes.c_void_p(value & (2**64 - 1)))


def _regset(request: int, tid: int, kind: int, content: ctypes.Array[ctypes.c_char]) -> None:
    place = struct.pack("2Q", ctypes.addressof(content), len(content))
    _libc.ptrace(request, tid, ctypes.c_void_p(kind), ctypes.create_string_buffer(place, 16))


def _set_register_arm(tid: int, number: int, value: int) -> None:
    registers = ctypes.create_string_buffer(34 * 8)
    _regset(_GETREGSET, tid, 1, registers)
    struct.pack_into("q", registers, 8 * number, value)
    _regset(_SETREGSET, tid, 1, registers)


def _vector(tid: int, arguments: tuple[int, ...]) -> list[tuple[int, int]]:
    """Address and length of each part of what a ``writev`` writes."""
    return list(struct.iter_unpack("2Q", _read(tid, arguments[1], 16 * arguments[2])))


def _read(tid: int, address: int, size: int) -> bytes:
    memory = os.open(f"/proc/{tid}/mem", os.O_RDONLY)
    try:
        return os.pread(memory, size, address)
    finally:
        os.close(memory)
