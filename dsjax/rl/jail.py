"""The process that model-written programs run in: it gives up its rights, then forks once for each program.

Started once for each worker, with nothing in its environment and one socket. It imports what programs usually import,
so that a fork of it starts at once, and stays untouched by them: a program lives in a child, which a filter of system
calls keeps from reaching anything else, and the next one gets a new child. Nothing about tests or expected values is
ever sent here; a child hears its program, then the arguments of one call at a time.

Only Python's own modules and those beside this file that import nothing of ours are used: inside bubblewrap there is
nothing else.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import gc
import importlib
import itertools
import json
import os
import pathlib
import platform
import resource
import select
import signal
import site
import socket
import struct
import sys
import sysconfig
import types
from collections.abc import Callable
from typing import Any, NoReturn

from dsjax.rl import landlock, plain, seccomp

CHANNEL = 3  # in a program's process the one descriptor that leads anywhere
NOBODY = 65534
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
CAPSET = {"x86_64": 126, "aarch64": 91}
CAPABILITY_VERSION_3 = 0x20080522
# Exit codes of a child. Whatever they say, nobody gains by them.
NOT_CONFINED, OUT_OF_MEMORY = 70, 71
PACKAGES_OF_OTHERS = ("site-packages", "dist-packages")  # and whatever lies among them
MOST_DESCRIPTORS = 256  # of this process, which opens six
MOST_TEXT = 1000  # characters of an exception's message, and of its arguments

PRELOADED = """
    _strptime abc argparse array ast asyncio base64 binascii bisect bz2 calendar cmath cmd codecs collections
    collections.abc colorsys concurrent.futures configparser contextlib contextvars copy copyreg csv ctypes
    dataclasses datetime decimal difflib dis encodings.ascii encodings.cp1252 encodings.hex_codec encodings.idna
    encodings.latin_1 encodings.punycode encodings.rot_13 encodings.utf_16 encodings.utf_32 encodings.utf_8_sig enum
    errno filecmp fnmatch fractions functools gc getopt glob graphlib gzip hashlib heapq hmac html html.entities
    importlib inspect io ipaddress itertools json keyword linecache locale logging lzma math mmap multiprocessing
    numbers opcode operator os pathlib pickle pkgutil platform pprint queue random re reprlib resource sched secrets
    selectors shlex shutil signal socket sqlite3 statistics string stringprep struct subprocess symtable sys
    tempfile textwrap threading time timeit token tokenize tomllib traceback types typing unicodedata unittest
    unittest.mock urllib.parse urllib.request uuid warnings weakref xml.etree.ElementTree zlib zoneinfo
"""


def main(level: str) -> None:
    """Serves the worker at the other end of standard input until it hangs up.

    Args:
        level: of ``dsjax.rl.isolation``; inside bubblewrap there are no files but Python's own.
    """
    control = socket.socket(fileno=os.dup(0))
    os.dup2(1, 0)  # as standard output and the null device: nothing comes from it
    for name in PRELOADED.split():
        with contextlib.suppress(ImportError):  # some Pythons are built without a library
            importlib.import_module(name)
    site.setquit()  # exit() and quit(), which a program may expect
    os.environ.clear()
    sys.argv[:] = [""]
    files = give_up_rights(namespaces=level == "bubblewrap")
    code = seccomp.assemble(platform.machine(), files=files)
    os.dup2(1, 2)  # until here a complaint is read by the worker
    gc.collect()
    gc.freeze()
    control.send(json.dumps({"ready": True, "files": files}).encode())
    serve(control, code)


def give_up_rights(*, namespaces: bool) -> bool:
    """Another root and another user where we may, no capabilities, no new ones, and of files only Python's own.

    Returns:
        Whether something keeps other files from being read; if not, a program may open none.
    """
    libraries = [pathlib.Path(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib")]
    entries = [entry for library in libraries for entry in library.iterdir()]
    own = [entry for entry in entries if entry.name not in PACKAGES_OF_OTHERS]
    rules = landlock.rules(own, libraries)  # first, while everything can be seen
    held = namespaces or rules is not None
    if os.getuid() == 0:  # a container's root may do only some of this
        with contextlib.suppress(OSError):
            if libraries[0] == libraries[1]:
                see_only(libraries[0])
                held = held or len(own) == len(entries)
        with contextlib.suppress(OSError):
            os.setgroups([])
        with contextlib.suppress(OSError):
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    no_capabilities()
    seccomp.prctl(seccomp.PR_SET_NO_NEW_PRIVS, 1)
    if rules is not None:
        landlock.obey(rules)
    seccomp.prctl(PR_SET_DUMPABLE, 0)  # /proc/PID/mem is closed to processes of the same user
    seccomp.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # last: a change of user clears it
    return held


def see_only(library: pathlib.Path) -> None:
    """Makes Python's library the root of all files, and lets imports look there. Raises OSError."""
    os.chroot(library)
    os.chdir("/")
    paths = [vars(module).get("__path__") for module in sys.modules.values()]
    for places in (sys.path, *(places for places in paths if isinstance(places, list))):
        places[:] = [place.removeprefix(str(library)) or "/" for place in places]
    sys.path_importer_cache.clear()


def no_capabilities() -> None:
    """Empties the sets of this thread. Raises OSError."""
    header, nothing = struct.pack("=Ii", CAPABILITY_VERSION_3, 0), bytes(24)
    if ctypes.CDLL(None, use_errno=True).syscall(CAPSET[platform.machine()], header, nothing):
        raise OSError(ctypes.get_errno(), "capset")


# ---------------------------------------------------------------- one child for each program


def serve(control: socket.socket, code: bytes) -> None:
    """Forks for each request to start, kills on request, and tells when and how a child has ended."""
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # so that the pipe is written
    running: dict[int, int] = {}  # process -> the worker's number for it
    while True:
        ready, _, _ = select.select([control.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            for pid in list(running):
                done, status, used = os.wait4(pid, os.WNOHANG)
                if done:
                    ended = {"ended": running.pop(pid), "status": status, "cpu": used.ru_utime + used.ru_stime}
                    control.send(json.dumps(ended).encode())
        if control.fileno() in ready:
            message, descriptors, _, _ = socket.recv_fds(control, 4096, 1)
            if not message:
                os._exit(0)
            request = json.loads(message)
            if "kill" in request:
                for pid in [pid for pid, number in running.items() if number == request["kill"]]:
                    os.kill(pid, signal.SIGKILL)
                continue
            try:
                pid = os.fork()
            except OSError as error:
                control.send(json.dumps({"failed": request["start"], "error": str(error)}).encode())
            else:
                if pid == 0:
                    child(control, descriptors[0], request, code)
                running[pid] = request["start"]
            os.close(descriptors[0])


def child(control: socket.socket, channel: int, limits: dict[str, Any], code: bytes) -> NoReturn:
    """Confines itself, says so, and only then hears what it is to run."""
    try:
        confine(control, channel, limits, code)
        os.write(CHANNEL, b"r")  # the kernel tells the judge who wrote it
        answer()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    finally:
        os._exit(NOT_CONFINED)


def confine(control: socket.socket, channel: int, limits: dict[str, Any], code: bytes) -> None:
    """Closes all descriptors but the channel, sets the limits, and puts the filter on. Raises OSError."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    control.detach()
    os.dup2(channel, CHANNEL)
    os.closerange(CHANNEL + 1, MOST_DESCRIPTORS)
    parent = os.getppid()
    seccomp.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise OSError("the jail is gone")
    seconds = limits["cpu"]
    for kind, soft, hard in (
        (resource.RLIMIT_AS, limits["address_space"], limits["address_space"]),
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_NOFILE, 64, 64),
        *((kind, 0, 0) for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NPROC)),
        *((kind, 0, 0) for kind in (resource.RLIMIT_MEMLOCK, resource.RLIMIT_MSGQUEUE)),
    ):
        resource.setrlimit(kind, (soft, hard))
    seccomp.install(code)


# ---------------------------------------------------------------- the program; from here on it may change all there is

KEPT: list[Any] = []  # what was no plain data, in order; the judge may name its number as an argument


def answer() -> NoReturn:
    """Loads the program, then answers calls with what its functions return or raise."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    first = receive([])
    try:
        exec(parse(first["code"], first["before"]), module.__dict__)
        message = plain.pack({"value": None})
    except BaseException as error:
        message = plain.pack(raised(error))
    while True:
        write(message)
        missing: list[str] = []
        call = receive(missing)
        try:
            if call["name"] not in module.__dict__:
                message = plain.pack({"id": call["id"], "missing": True})
                continue
            if missing:
                raise NameError(f"name {missing[0]!r} is not defined")
            value = module.__dict__[call["name"]](*call["arguments"], **call["keywords"])
            message = plain.pack({"id": call["id"], "value": value}, otherwise)
        except plain.NotPlain:
            message = plain.pack({"id": call["id"], "value": TooDeep()}, otherwise)
        except BaseException as error:
            message = plain.pack({"id": call["id"], **raised(error)})


def parse(code: str, before: str) -> types.CodeType:
    """The program; with ``before`` only what stands in front of that function, as the prompt's own functions do."""
    try:
        if not before:
            return compile(code, "<program>", "exec")
        tree = ast.parse(code, "<program>")
        tree.body = list(itertools.takewhile(lambda node: getattr(node, "name", "") != before, tree.body))
        return compile(tree, "<program>", "exec")
    except (SyntaxError, ValueError) as error:  # ValueError for characters that no source has
        raise SyntaxError(str(error)) from None


class TooDeep:
    """Stands for what is nested too deep to travel."""


def otherwise(x: Any) -> Any:
    """What is sent for an object that is not plain data: as which it would compare, or else only its type, its truth
    and its number among those kept here."""
    for kind, copy in BASES.items():
        if isinstance(x, kind) and type(x).__eq__ is kind.__eq__:
            return plain.encode(copy(x), otherwise)
    try:
        true = bool(x)
    except BaseException:
        true = True
    KEPT.append(x)
    return {"opaque": [exactly(type(x).__name__), true, len(KEPT) - 1]}


# Read by the type's own methods, whatever a subclass says; a named tuple, say, compares as the tuple that it is.
BASES: dict[type, Callable[[Any], Any]] = {
    int: int.__index__,
    float: float.__float__,
    str: lambda x: str.__getitem__(x, slice(None)),
    tuple: lambda x: tuple.__getitem__(x, slice(None)),
    list: lambda x: list.__getitem__(x, slice(None)),
    dict: dict.copy,
    set: lambda x: {*set.__iter__(x)},
    frozenset: lambda x: frozenset(frozenset.__iter__(x)),
}


def raised(error: BaseException) -> dict[str, Any]:
    """The names of an exception's classes, from its own upwards, its message, and what it was made of, if that is
    little and plain data."""
    try:
        text = exactly(str(error))
    except BaseException:
        text = ""
    arguments: list[Any] = []
    with contextlib.suppress(BaseException):
        own = list(vars(BaseException)["args"].__get__(error))  # whatever a subclass says
        if len(json.dumps(plain.encode(own, depth=2))) <= MOST_TEXT:  # as deep as it is in a message
            arguments = own
    names = [exactly(kind.__name__) for kind in type(error).__mro__]
    return {"raised": names, "text": text, "arguments": arguments}


def exactly(text: str) -> str:
    """A string of type str, whatever subclass of it this one is."""
    return str.__getitem__(text, slice(MOST_TEXT))


def receive(missing: list[str]) -> Any:
    """The judge's next message; ends the process when there will be none. Adds names that the program has not."""

    def named(kind: str, name: Any) -> Any:
        if kind == "kept":
            return KEPT[name]
        names = sys.modules["program"].__dict__
        return names[name] if name in names else missing.append(name)

    body = read(int.from_bytes(read(plain.HEADER), "big"))
    return plain.unpack(body, named)


def read(count: int) -> bytes:
    """So many bytes of the channel."""
    parts = []
    while count:
        part = os.read(CHANNEL, min(count, 1 << 20))
        if not part:
            os._exit(0)
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def write(data: bytes) -> None:
    """All bytes of it, into the channel."""
    view = memoryview(data)
    while view:
        view = view[os.write(CHANNEL, view) :]
