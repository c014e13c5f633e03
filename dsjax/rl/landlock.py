"""Landlock: this process, and all that it starts, may read the given files and no others, and write none.

A part of Linux since 5.13 that needs no rights, so it also works where there are no user namespaces. It judges the
opening of
files: their names, sizes and times can still be asked for. From later versions of it come: no TCP connection, no
signal and no abstract socket to a process outside. Source: landlock(7), linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import struct

# The same numbers on every processor.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
ASK_FOR_VERSION, PATH_BENEATH = 1, 1
READ_FILE, READ_DIR = 1 << 2, 1 << 3
# Rights over files that each version of Landlock knows: the first 13, REFER, TRUNCATE, IOCTL_DEV.
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
TCP_RIGHTS, SCOPES = 0b11, 0b11  # bind and connect since version 4, abstract sockets and signals since 6

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def version() -> int:
    """Of the kernel's Landlock; 0 where it has none, or may not be used."""
    return max(
        0, _libc.syscall(ctypes.c_long(CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint32(ASK_FOR_VERSION))
    )


def rules(paths: list[pathlib.Path], folders: list[pathlib.Path]) -> int | None:
    """Rules: ``paths`` (and what lies in them) can be read, the ``folders`` be listed, nothing else be opened.

    Returns:
        A descriptor for ``obey``; None where the kernel has no Landlock.
    """
    known = version()
    if not known:
        return None
    rights = (1 << FILE_RIGHTS[min(known, 5)]) - 1
    attributes = struct.pack("=QQQ", rights, TCP_RIGHTS, SCOPES)[: 8 if known < 4 else 16 if known < 6 else 24]
    ruleset = _call(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    for path in paths:
        _allow(ruleset, path, READ_FILE | READ_DIR if path.is_dir() else READ_FILE)
    for folder in folders:
        _allow(ruleset, folder, READ_DIR)
    return ruleset


def obey(ruleset: int) -> None:
    """Puts the rules on this thread and all that it may become, for good; needs no_new_privs. Closes the descriptor."""
    _call(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    os.close(ruleset)


def _allow(ruleset: int, path: pathlib.Path, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        rule = struct.pack("=Qi", rights, place)
        _call(ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(PATH_BENEATH), rule, ctypes.c_uint32(0))
    finally:
        os.close(place)


def _call(number: int, *arguments: object) -> int:
    result = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"landlock: {os.strerror(code)}")
    return result
