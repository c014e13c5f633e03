"""How the process that programs run in is started: what stands between it and the machine.

Two levels, best first. ``bubblewrap``: namespaces of its own for users, processes, network, mounts and the rest, in
which only Python's own files exist, read-only. ``seccomp``: the machine's namespaces; another user if we are root,
and Landlock where the kernel has it. Under both lie the limits and the filter of system calls of ``dsjax.rl.jail``.
Which one works is found out by running a program, never by looking for a file.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import sys
import sysconfig
from collections.abc import Sequence

LEVELS = ("bubblewrap", "seccomp")
MACHINES = ("x86_64", "aarch64")  # for which there is a filter of system calls
# What a jail imports: nothing else of this library is visible to it, above all no tasks and no answers.
FILES = ("jail.py", "landlock.py", "plain.py", "seccomp.py")
PACKAGE = pathlib.Path(__file__).parent.parent
# Modules of this package by their own names, without running the package's __init__. The signals that end what takes
# too long do so again: libtpu ignores SIGPROF, and a process that is started ignores what its parent does.
BOOT = """
import importlib, signal, sys, types
for number in (signal.SIGPROF, signal.SIGXCPU):
    signal.signal(number, signal.SIG_DFL)
for name, folder in (("dsjax", sys.argv[1]), ("dsjax.rl", sys.argv[1] + "/rl")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
importlib.import_module("dsjax.rl." + sys.argv[2]).main(*sys.argv[3:])
"""
FLAGS = ("-P", "-s", "-B", "-X", "utf8")


def interpreter() -> pathlib.Path:
    """The Python that virtual environments point to."""
    return pathlib.Path(getattr(sys, "_base_executable", None) or sys.executable).resolve()


def environment() -> dict[str, str]:
    """All that workers and jails see of ours; a jail empties it once it runs.

    Sets come in the same order in every process, so that the same program gets the same verdict.
    """
    needed = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {"PYTHONHASHSEED": "0", **needed}


def worker_command(module: str, arguments: Sequence[str]) -> list[str]:
    """What starts a module as a worker, outside: with the packages that tests may import."""
    return [sys.executable, *FLAGS, "-c", BOOT, str(PACKAGE), module, *arguments]


def jail_command(level: str) -> list[str] | None:
    """What starts the process that forks one child for each program; None if it is certain not to work here."""
    python = [str(interpreter()), *FLAGS, "-S", "-c", BOOT]
    if level == "seccomp":
        return [*python, str(PACKAGE), "jail", level]
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        return None
    namespaces = [f"--unshare-{kind}" for kind in ("user", "ipc", "pid", "net", "uts", "cgroup-try")]
    rights = ["--uid", "65534", "--gid", "65534", "--cap-drop", "ALL", "--hostname", "jail"]
    own = [word for name in FILES for word in ("--ro-bind", str(PACKAGE / "rl" / name), f"/dsjax/rl/{name}")]
    read_only = ["--remount-ro", "/", "--chdir", "/"]
    life = ["--die-with-parent", "--new-session"]
    options = [*namespaces, *rights, *python_files(), *own, *read_only, *life]
    return [bubblewrap, *options, *python, "/dsjax", "jail", level]


def python_files() -> list[str]:
    """Bubblewrap's options for the interpreter, its library and the system's libraries, without anybody's packages."""
    library = pathlib.Path(sysconfig.get_path("stdlib")).resolve()
    roots = [pathlib.Path(sys.base_prefix) / name for name in ("lib", "lib64")]
    roots += [pathlib.Path(name) for name in ("/lib", "/lib64", "/usr/lib", "/usr/lib64")]
    options = ["--ro-bind", str(interpreter()), str(interpreter())]
    options += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for root in dict.fromkeys(roots):
        if root.is_symlink():
            options += ["--symlink", str(root.readlink()), str(root)]
        elif root.is_dir():
            options += ["--ro-bind", str(root), str(root)]
    if not any(library.is_relative_to(root.resolve()) for root in roots):
        options += ["--ro-bind", str(library), str(library)]
    places = dict.fromkeys([library, *(found for root in roots for found in root.resolve().glob("python*"))])
    for place in places:
        for name in ("site-packages", "dist-packages"):
            if (place / name).is_dir():
                options += ["--tmpfs", str(place / name), "--remount-ro", str(place / name)]
    return options
