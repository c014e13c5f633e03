"""A computation on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class InBackground:
    """Calls ``function`` on a thread; nobody waits for it if the process ends before."""

    def __init__(self, function: Callable[[], Any]):
        self._function = function
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error

    def done(self) -> bool:
        """Whether it has returned or raised."""
        return not self._thread.is_alive()

    def result(self, timeout: float | None = None) -> Any:
        """What it returned; raises what it raised.

        Raises:
            TimeoutError: it goes on for more than ``timeout`` seconds.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"not done after {timeout:g} s")
        if self._error is not None:
            raise self._error
        return self._result
