"""A process of this package that answers requests, and the socket to it: for the sandbox and for judges of answers."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Sequence
from typing import Any

from dsjax.rl import isolation, plain


class Trouble(Exception):
    """A process did not start, has ended, or could not do its part; a sentence."""


class WorkerProcess:
    """A module of this package that runs as a process of its own. Whoever makes one waits for its first word.

    Args:
        module: whose ``main`` it runs.
        arguments: of that.
        called: what it is, for sentences.

    Raises:
        Trouble: no process could be started.
    """

    def __init__(self, module: str, arguments: Sequence[str], *, called: str):
        self._called = called
        self.channel, theirs = socket.socketpair()
        with theirs:
            try:
                self.process = subprocess.Popen(
                    isolation.worker_command(module, arguments),
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=isolation.environment(),
                    start_new_session=True,  # Ctrl-C is for us alone
                )
            except OSError as error:
                self.channel.close()
                raise Trouble(f"no process could be started: {error}") from None

    def first_word(self, seconds: float) -> dict[str, Any]:
        """What it says when it is ready; one that says nothing is ended. Raises ``Trouble``."""
        try:
            return self.receive(seconds)
        except Trouble:
            self.close()
            raise

    def ask(self, message: bytes, seconds: float) -> dict[str, Any]:
        """Sends a request; returns the reply. Raises ``Trouble``."""
        self.channel.settimeout(seconds)
        try:
            self.channel.sendall(message)
        except OSError as error:
            raise Trouble(f"{self._called} has ended: {error}") from None
        return self.receive(seconds)

    def receive(self, seconds: float) -> dict[str, Any]:
        """Its next reply. Raises ``Trouble``, also if the process tells of some."""
        self.channel.settimeout(seconds)
        try:
            with self.channel.makefile("rb") as file:
                header = file.read(plain.HEADER)
                reply = plain.unpack(file.read(int.from_bytes(header, "big")))
        except TimeoutError:
            raise Trouble(f"{self._called} said nothing for {seconds:.0f} s") from None
        except (OSError, plain.Malformed) as error:
            raise Trouble(f"{self._called} has ended: {error}") from None
        if "trouble" in reply:
            raise Trouble(reply["trouble"])
        return reply

    def close(self) -> None:
        """Ends it; what it has started ends when it finds the channel closed, or its time is over."""
        self.channel.close()
        self.process.kill()
        self.process.wait()
