"""What attacks are shown, and whether anything became of it; sandboxes of each kind that works here."""

from __future__ import annotations

import os
import pathlib
import secrets
import select
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import pytest
from sandbox_attacks import Attack

from dsjax.config import UserError
from dsjax.rl import isolation
from dsjax.rl.sandbox import Program, Sandbox, Verdict

KINDS = ("bubblewrap", "seccomp", "landlock", "filter_alone")
SHARED = pathlib.Path("/dev/shm")


def sandbox_of(kind: str, workers: int = 1) -> Sandbox:
    """One of ``KINDS``, or "open". Skips the test where bubblewrap does not work."""
    if kind in ("open", "landlock", "filter_alone"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(isolation, "jail_command", lambda level: other_jail(kind))
            if kind == "open":
                patch.setattr("dsjax.rl.sandbox.PROBE", "def probe(canary): return True")
            return Sandbox(workers, "seccomp")
    try:
        return Sandbox(workers, kind)
    except UserError as error:
        if kind != "bubblewrap":
            raise
        pytest.skip(f"bubblewrap does not work here: {error}")


def other_jail(kind: str) -> list[str]:
    """Command of a jail of ``sandbox_other_jail``."""
    script = pathlib.Path(__file__).with_name("sandbox_other_jail.py")
    return [str(isolation.interpreter()), *isolation.FLAGS, "-S", str(script), str(isolation.PACKAGE), kind]


class Place:
    """A folder, a secret, sockets and a process for one attack."""

    def __init__(self, folder: pathlib.Path) -> None:
        folder.mkdir()
        folder.chmod(0o777)
        self.folder = folder / "open"
        self.folder.mkdir()
        self.folder.chmod(0o777)
        canary = self.folder / "canary"
        canary.write_text("sings")
        canary.chmod(0o666)
        self.secret = folder / "secret"
        self.secret.write_text("out")
        self.name = f"dsjax-{secrets.token_hex(8)}"
        self.listeners = [socket.socket(kind, how) for kind, how in FAMILIES]
        self.listeners[0].bind(("127.0.0.1", 0))
        port = self.listeners[0].getsockname()[1]
        self.listeners[1].bind(("127.0.0.1", port))
        self.listeners[2].bind(f"\0{self.name}")
        for listener in (self.listeners[0], self.listeners[2]):
            listener.listen(4)
        self.process = subprocess.Popen(
            ["marker"], executable="/bin/cat", stdin=subprocess.PIPE, start_new_session=True
        )
        self.shared = SHARED / self.name
        self.given = {
            "folder": str(self.folder),
            "secret": str(self.secret),
            "name": self.name,
            "port": port,
            "pid": self.process.pid,
            "shared": str(self.shared),
        }
        self.before = self.look()

    def look(self) -> list[Any]:
        """All that an attack may change."""
        found = []
        for path in (self.folder, *sorted(self.folder.rglob("*"))):
            stat = path.lstat()
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            modified = 0 if path == self.folder else stat.st_mtime_ns
            found.append((path.name, stat.st_mode, stat.st_uid, stat.st_size, modified, content))
        return [found, self.shared.exists()]

    def changed(self) -> bool:
        """Whether something became of the attack."""
        heard = select.select(self.listeners, [], [], 0)[0]
        return bool(heard) or self.look() != self.before or self.process.poll() is not None

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.shared.unlink(missing_ok=True)


FAMILIES = (
    (socket.AF_INET, socket.SOCK_STREAM),
    (socket.AF_INET, socket.SOCK_DGRAM),
    (socket.AF_UNIX, socket.SOCK_STREAM),
)


def try_all(
    sandbox: Sandbox, attacks: Sequence[Attack], folder: pathlib.Path
) -> tuple[list[Verdict], list[bool], list[str]]:
    """Runs the attacks. Returns verdicts, whether each had an effect, and the names of those that did."""
    places = [Place(folder / attack.name) for attack in attacks]
    try:
        programs = [
            Program(attack.code, [((place.given,), "out")], "attack", timeout=3)
            for attack, place in zip(attacks, places, strict=True)
        ]
        verdicts = sandbox.check(programs)
        time.sleep(0.5)  # for what stays behind
        effects = [bool(v.passed) or place.changed() for v, place in zip(verdicts, places, strict=True)]
    finally:
        for place in places:
            place.close()
    return verdicts, effects, [attack.name for attack, effect in zip(attacks, effects, strict=True) if effect]


def children_of(pid: int) -> list[int]:
    """All processes that descend from one, itself too."""
    parents: dict[int, int] = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(folder.name)] = int(fields[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def alive(pids: Sequence[int]) -> list[int]:
    """Those that still run."""
    found = []
    for pid in pids:
        try:
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            found.append(pid)
    return found


def wait_until_gone(pids: Sequence[int], seconds: float) -> list[int]:
    """Those that are still there after so long."""
    end = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < end:
        time.sleep(0.05)
    return alive(pids)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
