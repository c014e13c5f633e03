"""The key-value store of the coordination service, which process 0 hosts."""

from __future__ import annotations

from typing import Any

PREFIX = "dsjax/"


class StoreError(Exception):
    """The service does not answer."""


class Store:
    """Text under keys. Only :meth:`get` has a time limit: the other calls hang while process 0 is frozen."""

    def __init__(self, client: Any):
        self._client = client

    def get(self, key: str, seconds: float) -> str | None:
        """A value, once it is there; None: not within ``seconds``."""
        try:
            return self._client.blocking_key_value_get(PREFIX + key, max(1, int(seconds * 1000)))
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise StoreError(str(error)) from None

    def set(self, key: str, value: str) -> None:
        """Sets or replaces a value."""
        try:
            self._client.key_value_set(PREFIX + key, value, allow_overwrite=True)
        except RuntimeError as error:
            raise StoreError(str(error)) from None

    def set_first(self, key: str, value: str) -> bool:
        """Sets a value that nobody has set; False: somebody had."""
        try:
            self._client.key_value_set(PREFIX + key, value)
        except RuntimeError as error:
            if "ALREADY_EXISTS" in str(error):
                return False
            raise StoreError(str(error)) from None
        return True

    def under(self, folder: str) -> dict[str, str]:
        """All values under ``folder/``, by the rest of their keys."""
        begin = f"{PREFIX}{folder}/"
        try:
            return {key.removeprefix(begin): value for key, value in self._client.key_value_dir_get(begin)}
        except RuntimeError as error:
            raise StoreError(str(error)) from None

    def delete(self, key: str) -> None:
        """Deletes a value, or all values under a folder."""
        try:
            self._client.key_value_delete(PREFIX + key)
        except RuntimeError as error:
            raise StoreError(str(error)) from None
