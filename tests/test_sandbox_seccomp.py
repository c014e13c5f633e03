"""The filter of system calls, instruction by instruction, as the kernel would run it on either processor."""

from __future__ import annotations

import errno
import functools
import os
import platform
import struct
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.rl import seccomp

MACHINES = sorted(seccomp.MACHINES)
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # EM_X86_64 62 and EM_AARCH64 183, 64 bits, little-endian
COLUMN = {"x86_64": 0, "aarch64": 1}


def run(code: bytes, number: int, arguments: tuple[int, ...] = (), audit: int = 0) -> int:
    """Interprets a BPF program on struct seccomp_data, as linux/filter.h has it, and returns what it returns."""
    words = [argument & (2**64 - 1) for argument in (*arguments, *(0,) * (6 - len(arguments)))]
    data = struct.pack("<iIQ6Q", number if number < 2**31 else number - 2**32, audit, 0, *words)
    program = list(struct.iter_unpack("<HBBI", code))
    accumulator, at = 0, 0
    for _ in range(len(program)):
        operation, yes, no, k = program[at]
        at += 1
        if operation == 0x20:  # ld [k]
            assert k % 4 == 0
            accumulator = struct.unpack_from("<I", data, k)[0]
        elif operation == 0x06:  # ret k
            return k
        else:
            test = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: accumulator & k != 0}[operation]
            at += yes if test else no
    raise AssertionError("it never returns")


@functools.cache
def assembled(machine: str, files: bool) -> bytes:
    return seccomp.assemble(machine, files=files)


def verdict(machine: str, name: str, *arguments: int, files: bool = True) -> int:
    number = {**seccomp.CALLS, **OTHERS}[name][COLUMN[machine]]
    assert number is not None
    return run(assembled(machine, files), number, arguments, AUDIT[machine])


# Calls that must be refused; numbers from arch/x86/entry/syscalls/syscall_64.tbl and asm-generic/unistd.h.
OTHERS: dict[str, tuple[int | None, int | None]] = {
    **{"clone": (56, 220), "fork": (57, None), "vfork": (58, None), "clone3": (435, 435), "execve": (59, 221)},
    **{"execveat": (322, 281), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271)},
    **{"socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept4": (288, 242)},
    **{"sendto": (44, 206), "sendmsg": (46, 211), "recvmsg": (47, 212), "socketpair": (53, 199)},
    **{"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138)},
    **{"pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438)},
    **{"unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41)},
    **{"chroot": (161, 51), "chdir": (80, 49), "setuid": (105, 146), "setresuid": (117, 147), "setgroups": (116, 159)},
    **{
        "capset": (126, 91),
        "prctl": (157, 167),
        "seccomp": (317, 277),
        "personality": (135, 92),
        "setrlimit": (160, 164),
    },
    **{"open": (2, None), "creat": (85, None), "openat2": (437, 437), "unlink": (87, None), "unlinkat": (263, 35)},
    **{"rename": (82, None), "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34), "mknodat": (259, 33)},
    **{
        "symlinkat": (266, 36),
        "linkat": (265, 37),
        "truncate": (76, 45),
        "ftruncate": (77, 46),
        "fallocate": (285, 47),
    },
    **{"fchmodat": (268, 53), "fchownat": (260, 54), "utimensat": (280, 88), "setxattr": (188, 5)},
    **{
        "pwrite64": (18, 68),
        "pwritev": (296, 70),
        "sendfile": (40, 71),
        "splice": (275, 76),
        "copy_file_range": (326, 285),
    },
    **{
        "pipe2": (293, 59),
        "dup2": (33, None),
        "dup3": (292, 24),
        "memfd_create": (319, 279),
        "memfd_secret": (447, 447),
    },
    **{"io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "userfaultfd": (323, 282), "bpf": (321, 280)},
    **{
        "perf_event_open": (298, 241),
        "keyctl": (250, 219),
        "add_key": (248, 217),
        "shmget": (29, 194),
        "shmat": (30, 196),
    },
    **{
        "msgget": (68, 186),
        "semget": (64, 190),
        "mq_open": (240, 180),
        "pkey_mprotect": (329, 288),
        "shmctl": (31, 195),
    },
    **{"setpriority": (141, 140), "sched_setaffinity": (203, 122), "setsid": (112, 157), "setpgid": (109, 154)},
    **{"init_module": (175, 105), "reboot": (169, 142), "sethostname": (170, 161), "settimeofday": (164, 170)},
    **{"arch_prctl": (158, None), "modify_ldt": (154, None), "iopl": (172, None), "inotify_init1": (294, 26)},
    **{"name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "landlock_restrict_self": (446, 446)},
    **{"timer_create": (222, 107), "setitimer": (38, 103), "epoll_create1": (291, 20), "eventfd2": (290, 19)},
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("files", [True, False])
def test_what_is_not_named_is_refused(machine: str, files: bool) -> None:
    code = seccomp.assemble(machine, files=files)
    named = {numbers[COLUMN[machine]] for numbers in seccomp.CALLS.values()}
    for number in range(600):
        if number not in named:
            assert run(code, number, (), AUDIT[machine]) == REFUSE, number
    for name, numbers in OTHERS.items():
        assert name not in seccomp.CALLS
        number = numbers[COLUMN[machine]]
        assert number is None or run(code, number, (), AUDIT[machine]) == REFUSE, name


@pytest.mark.parametrize("machine", MACHINES)
def test_what_python_needs_is_allowed(machine: str) -> None:
    needed = ("read", "write", "close", "brk", "munmap", "madvise", "rt_sigaction", "clock_nanosleep", "getrandom")
    for name in (*needed, "exit_group"):
        assert verdict(machine, name, 1, 2, 3, 4, 5, 6) == ALLOW


@pytest.mark.parametrize("machine", MACHINES)
def test_calls_by_another_convention_end_the_process(machine: str) -> None:
    code = seccomp.assemble(machine, files=True)
    (other,) = set(MACHINES) - {machine}
    for audit in (AUDIT[other], 0x40000003, 0x40000028, 0):  # i386, 32-bit ARM
        assert run(code, 0, (), audit) == KILL
    for number in (0, 1, 257, 0x3FFFFFFF):
        assert run(code, 0x40000000 | number, (), AUDIT[machine]) == KILL  # x32


@pytest.mark.parametrize("machine", MACHINES)
def test_files_are_opened_to_be_read_and_nothing_else(machine: str) -> None:
    arm = machine == "aarch64"
    directory, no_follow, direct = (0x4000, 0x8000, 0x10000) if arm else (0x10000, 0x20000, 0x4000)
    large = 0x20000 if arm else 0x8000
    cloexec, create, truncate, append, path = 0x80000, 0x40, 0x200, 0x400, 0x200000
    for flags in (0, cloexec, cloexec | directory, cloexec | no_follow, large, 0x100 | 0x800):
        assert verdict(machine, "openat", -100, 1234, flags) == ALLOW
        assert verdict(machine, "openat", -100, 1234, flags, files=False) == REFUSE
    temporary = 0x400000 | directory
    for flags in (1, 2, 3, create, truncate, append, path, temporary, direct, cloexec | 1, create | cloexec):
        assert verdict(machine, "openat", -100, 1234, flags) == REFUSE


@pytest.mark.parametrize("machine", MACHINES)
def test_memory_is_never_both_written_and_run(machine: str) -> None:
    read, write, run_ = 1, 2, 4
    private, anonymous = 2, 0x20
    for protection in (0, read, read | write):
        assert verdict(machine, "mmap", 0, 4096, protection, private | anonymous, -1, 0) == ALLOW
        assert verdict(machine, "mprotect", 0, 4096, protection) == ALLOW
    assert verdict(machine, "mmap", 0, 4096, read | run_, private, 3, 0) == ALLOW  # a library
    for protection in (run_, read | run_, read | write | run_, 0xFFFFFFFF00000004):
        assert verdict(machine, "mmap", 0, 4096, protection, private | anonymous, -1, 0) == REFUSE
        assert verdict(machine, "mprotect", 0, 4096, protection) == REFUSE
    assert verdict(machine, "mmap", 0, 4096, write | run_, private, 3, 0) == REFUSE


@pytest.mark.parametrize("machine", MACHINES)
def test_arguments_of_the_others_are_limited(machine: str) -> None:
    assert verdict(machine, "prlimit64", 0, 7, 0, 1234) == ALLOW
    for arguments in ((0, 7, 1234, 0), (77, 7, 0, 1234), (0, 7, 1 << 40, 0), (1 << 40, 7, 0, 0)):
        assert verdict(machine, "prlimit64", *arguments) == REFUSE
    allowed = {0, 1, 2, 3, 1030}
    for command in range(2000):  # F_SETFL, F_SETOWN, F_SETSIG, F_NOTIFY, F_ADD_SEALS, F_SETPIPE_SZ ...
        assert verdict(machine, "fcntl", 1, command) == (ALLOW if command in allowed else REFUSE)
    for operation in range(512):
        wait_or_wake = operation & ~384 in (0, 1, 9, 10)  # and not FUTEX_LOCK_PI, CMP_REQUEUE_PI ...
        assert verdict(machine, "futex", 1234, operation) == (ALLOW if wait_or_wake else REFUSE)
    for request, expected in ((0x5401, ALLOW), (0x5451, ALLOW), (0x5450, ALLOW), (0x5412, REFUSE), (0x5421, REFUSE)):
        assert verdict(machine, "ioctl", 0, request) == expected
    assert verdict(machine, "newfstatat", 3, 1234, 1234, 0x1000, files=False) == ALLOW  # fstat
    assert verdict(machine, "newfstatat", -100, 1234, 1234, 0, files=False) == REFUSE
    assert verdict(machine, "newfstatat", -100, 1234, 1234, 0) == ALLOW


@pytest.mark.parametrize("machine", MACHINES)
@given(number=st.integers(0, 2**32 - 1), arguments=st.tuples(*[st.integers(0, 2**64 - 1)] * 6), files=st.booleans())
@settings(max_examples=300, deadline=None)
def test_every_call_gets_one_of_three_answers(
    machine: str, number: int, arguments: tuple[int, ...], files: bool
) -> None:
    code = assembled(machine, files)
    assert run(code, number, arguments, AUDIT[machine]) in (ALLOW, REFUSE, KILL)
    assert run(code, number, arguments, AUDIT[machine] ^ 1) == KILL


def test_the_numbers_are_this_machines() -> None:
    """For those that can be asked for by what they do: the C library's own call, beside the call by number."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        pytest.skip("another machine")
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    column = COLUMN[platform.machine()]
    for name in ("getpid", "getppid", "getuid", "geteuid", "getgid", "getegid"):
        assert libc.syscall(seccomp.CALLS[name][column]) == getattr(os, name)()
    assert seccomp.MACHINES[platform.machine()].open_flags == os.O_DIRECTORY | os.O_NOFOLLOW | 0o100000 << (
        2 if platform.machine() == "aarch64" else 0
    )
