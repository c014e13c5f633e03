"""The system calls that a program may make, as a seccomp filter: classic BPF, put together here and loaded with ctypes.

The list says what is allowed. Everything else gives EPERM, which Python raises as PermissionError: what starts a
process or a thread, opens a socket or a file to write, names another process, changes a limit or maps memory that can
be written and run. Of an allowed call the filter sees the numbers among its arguments and never what a pointer points
to, so names of files are not its business: ``files`` says whether something else (a mount namespace, Landlock) holds
them, and without it no file can be opened at all. Calls by another convention than the machine's own (32 bits, x32)
end the process.

Sources: seccomp(2), linux/bpf_common.h, the tables of system calls of x86 and of asm-generic/unistd.h (aarch64).
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
import struct

# What a BPF program reads: struct seccomp_data. Both machines are little-endian: the low half of an argument
# stands first.
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
LOAD, RETURN = 0x20, 0x06  # BPF_LD | BPF_W | BPF_ABS, BPF_RET | BPF_K
IF_EQUAL, IF_AT_LEAST, IF_ANY_BIT = 0x15, 0x35, 0x45  # BPF_JMP with BPF_JEQ, BPF_JGE, BPF_JSET
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
X32 = 0x40000000  # this bit in the number of a call means the x32 convention

PROT_WRITE, PROT_EXEC, MAP_ANONYMOUS = 0x2, 0x4, 0x20
F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC = 0, 1, 2, 3, 1030
# FUTEX_WAIT, WAKE, WAIT_BITSET, WAKE_BITSET, each with or without FUTEX_PRIVATE_FLAG and FUTEX_CLOCK_REALTIME: what
# locks are made of, without the operations on several futexes and on owners
FUTEX = tuple(operation | flags for operation in (0, 1, 9, 10) for flags in (0, 128, 256, 384))
TCGETS, FIOCLEX, FIONCLEX = 0x5401, 0x5451, 0x5450
O_NOCTTY, O_NONBLOCK, O_CLOEXEC = 0o400, 0o4000, 0o2000000


@dataclasses.dataclass(frozen=True)
class Machine:
    """What differs: ``audit`` is AUDIT_ARCH_*, ``open_flags`` are O_DIRECTORY | O_NOFOLLOW | O_LARGEFILE."""

    audit: int
    column: int
    open_flags: int


MACHINES = {
    "x86_64": Machine(0xC000003E, 0, 0o200000 | 0o400000 | 0o100000),
    "aarch64": Machine(0xC00000B7, 1, 0o40000 | 0o100000 | 0o400000),
}

# name -> its number on x86_64 and on aarch64; what runs most often stands first
CALLS: dict[str, tuple[int | None, int | None]] = {
    "brk": (12, 214),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "futex": (202, 98),
    "read": (0, 63),
    "write": (1, 64),
    "clock_gettime": (228, 113),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigaction": (13, 134),
    "sigaltstack": (131, 132),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "pread64": (17, 67),
    "readv": (19, 65),
    "writev": (20, 66),
    "dup": (32, 23),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getrusage": (98, 165),
    "getrandom": (318, 278),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "restart_syscall": (219, 128),
    "uname": (63, 160),
    "getcwd": (79, 17),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "ioctl": (16, 29),
    "fcntl": (72, 25),
    "prlimit64": (302, 261),
    "newfstatat": (262, 79),
    "openat": (257, 56),
    "getdents64": (217, 61),
    "statx": (332, 291),
    "stat": (4, None),
    "lstat": (6, None),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
}
NEEDS_FILES = {
    *("openat", "getdents64", "statx", "stat", "lstat", "newfstatat"),
    *("readlink", "readlinkat", "access", "faccessat", "faccessat2"),
}
AT_EMPTY_PATH = 0x1000  # newfstatat with it is how the C library asks about an open file


@dataclasses.dataclass(frozen=True)
class Clear:
    """None of these bits is set in the low half of an argument."""

    argument: int
    bits: int


@dataclasses.dataclass(frozen=True)
class OneOf:
    """The low half of an argument is one of these."""

    argument: int
    values: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Zero:
    """All 64 bits of an argument are 0."""

    argument: int


Test = Clear | OneOf | Zero


def rules(machine: Machine, *, files: bool) -> dict[str, list[list[Test]]]:
    """What must hold of a call's arguments: all tests of one of the lists. A call that is not named may have any."""
    opened = O_NOCTTY | O_NONBLOCK | O_CLOEXEC | machine.open_flags  # and O_RDONLY, which is 0
    found: dict[str, list[list[Test]]] = {
        # code is mapped from files, which nobody here can write, and never from memory that a program filled itself
        "mmap": [[Clear(2, PROT_EXEC)], [Clear(2, PROT_WRITE), Clear(3, MAP_ANONYMOUS)]],
        "mprotect": [[Clear(2, PROT_EXEC)]],
        "futex": [[OneOf(1, FUTEX)]],
        "ioctl": [[OneOf(1, (TCGETS, FIOCLEX, FIONCLEX))]],
        "fcntl": [[OneOf(1, (F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC))]],
        "prlimit64": [[Zero(0), Zero(2)]],  # its own limits, read only
        "openat": [[Clear(2, ~opened & 0xFFFFFFFF)]],
    }
    if not files:
        found["newfstatat"] = [[OneOf(3, (AT_EMPTY_PATH,))]]
    return found


def assemble(machine: str, *, files: bool) -> bytes:
    """The filter, an array of struct sock_filter.

    Args:
        machine: a key of ``MACHINES``.
        files: whether files may be opened to read.
    """
    kind = MACHINES[machine]
    code = [
        (LOAD, 0, 0, ARCHITECTURE),
        (IF_EQUAL, 1, 0, kind.audit),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (IF_AT_LEAST, 0, 1, X32),
        (RETURN, 0, 0, KILL),
    ]
    conditions = rules(kind, files=files)
    for name, numbers in CALLS.items():
        number = numbers[kind.column]
        if number is None or (name in NEEDS_FILES and not files and name not in conditions):
            continue
        if name == "openat" and not files:
            continue
        body = _alternatives(conditions[name]) if name in conditions else [(RETURN, 0, 0, ALLOW)]
        code += [(IF_EQUAL, 0, len(body), number), *body]
    code.append((RETURN, 0, 0, REFUSE))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _alternatives(alternatives: list[list[Test]]) -> list[tuple[int, int, int, int]]:
    """Code that allows the call if all tests of one list hold, and else refuses it; it never falls through."""
    code: list[tuple[int, int, int, int]] = []
    for tests in alternatives:
        steps = [step for test in tests for step in _test(test)]
        # a test that fails jumps behind this list's RETURN
        for i, (operation, yes, no, value) in enumerate(steps):
            behind = len(steps) - i
            code.append((operation, behind if yes == _FAIL else yes, behind if no == _FAIL else no, value))
        code.append((RETURN, 0, 0, ALLOW))
    return [*code, (RETURN, 0, 0, REFUSE)]


_FAIL = -1


def _test(test: Test) -> list[tuple[int, int, int, int]]:
    """Code that goes on behind itself if the test holds; a jump to ``_FAIL`` is a jump out of the list of tests."""
    low = ARGUMENTS + 8 * test.argument
    if isinstance(test, Clear):
        return [(LOAD, 0, 0, low), (IF_ANY_BIT, _FAIL, 0, test.bits)]
    if isinstance(test, OneOf):
        *first, last = test.values
        found = [(IF_EQUAL, len(first) - i, 0, value) for i, value in enumerate(first)]
        return [(LOAD, 0, 0, low), *found, (IF_EQUAL, 0, _FAIL, last)]
    return [step for word in (low, low + 4) for step in ((LOAD, 0, 0, word), (IF_EQUAL, 0, _FAIL, 0))]


class _Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)


def prctl(option: int, *arguments: int) -> None:
    """prctl(2) on this thread. Raises OSError."""
    if _libc.prctl(option, *arguments, *(0,) * (4 - len(arguments))):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def install(code: bytes) -> None:
    """Puts the filter on this thread and all that it may become, for good. Raises OSError where the kernel has none."""
    program = _Program(len(code) // 8, code)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program))
