"""Jails as tests want them: one that holds nobody, to show that attacks would work, and some that hold with less.

Run as ``python -S sandbox_other_jail.py PACKAGE open|landlock|filter_alone``, in place of what
``isolation.jail_command`` says.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import types
from typing import Any

ATTACKERS_NEED = "dbm.dumb mmap multiprocessing.popen_fork pty py_compile"


def open_it(jail: Any) -> None:
    """What a jail does, without any defence."""
    seen = {**os.environ, "TOKEN": "x"}

    def confine(control: socket.socket, channel: int, limits: object, code: bytes) -> None:
        signal.set_wakeup_fd(-1)
        os.environ.update(seen)
        control.detach()
        os.dup2(channel, jail.CHANNEL)

    jail.confine = confine
    jail.give_up_rights = lambda *, namespaces: True


def main(package: str, kind: str) -> None:
    for name, folder in (("dsjax", package), ("dsjax.rl", f"{package}/rl")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [folder]
    jail: Any = importlib.import_module("dsjax.rl.jail")
    for name in ATTACKERS_NEED.split():  # no attack shall fail for want of a module
        importlib.import_module(name)
    if kind == "open":
        open_it(jail)
    elif kind == "landlock":
        os.getuid = lambda: 1  # what it does for those who are not root
    else:  # with all rights that we have, limits and filter alone
        jail.give_up_rights = lambda *, namespaces: False
    jail.main("seccomp")


if __name__ == "__main__":
    main(*sys.argv[1:])
