"""Which request gets which row of an engine, and what it takes over of the prompts of others."""

from __future__ import annotations

from typing import Any

import numpy as np

from dsjax.config import UserError
from dsjax.infer.pages import Prefix
from dsjax.infer.requests import Running

Copy = tuple[int, int, int, int]  # group, logical page, from, to


def admit(engine: Any) -> None:
    """Gives rows to the requests that came first, while there are rows and pages.

    A request waits for what another one is about to compute and it could take over; who comes behind it need not.
    """
    seats = Seats(engine)
    for running in list(engine.waiting):
        if not (rows := seats.next_rows()):
            break
        keys = {part: keys_of(engine, part, running) for part in rows}
        chains = {part: known(engine, keys[part], running) for part in rows}
        parts = [part for part in rows if not seats.is_coming(part, keys[part][len(chains[part]) :][:1])]
        if not parts:
            continue
        part = max(parts, key=lambda part: (len(chains[part]), len(seats.free[part])))
        running.keys = keys[part]
        if not seats.give(running, part, chains[part]):
            if not any(engine.rows) and not (chains[part] and seats.give(running, part, [])):
                engine.cancel(running.number)  # the others go on
                raise TooLong(running)
            break
    seats.copy()


class TooLong(UserError):
    """All pages together do not hold the request of that ``number``."""

    def __init__(self, running: Running):
        tokens = len(running.tokens)
        super().__init__(f"a request has {tokens} tokens, more than there are pages for; raise num_positions")
        self.number = running.number


def keys_of(engine: Any, part: int, running: Running) -> list[bytes]:
    """Of the prefixes that a request could take up; the last one may be all of its prompt."""
    if part not in running.keys_of_part:
        whole = running.request.num_samples > 1 and running.num_new == 0
        salt = np.asarray(running.request.before, np.int32).tobytes() if engine.reads else b""
        running.keys_of_part[part] = engine.prefixes.keys(part, running.tokens, whole=whole, salt=salt)
    return running.keys_of_part[part]


def known(engine: Any, keys: list[bytes], running: Running) -> list[Prefix]:
    """What there is of it. Somebody must say what comes next: a token is computed, or that was kept, too."""
    chain = engine.prefixes.find(keys)
    while chain and chain[-1].length == len(running.tokens) and chain[-1].behind is None:
        chain.pop()
    return chain


class Seats:
    """The free rows of a step, and what is being computed beside them.

    Pages that requests go on writing are copied for all of them at once, at the end; those that they are copied from
    are held so long.

    Attributes:
        free: rows of each batch part, the lowest last.
        coming: keys of prefixes that somebody on the part is about to compute.
    """

    def __init__(self, engine: Any):
        self.engine, parts = engine, range(engine.parts[0])
        self.free: dict[int, list[int]] = {part: [] for part in parts}
        for row in reversed(range(len(engine.rows))):
            if engine.rows[row] is None:
                self.free[engine.part(row)].append(row)
        self.coming: dict[int, set[bytes]] = {part: set() for part in parts}
        for running in engine.running():
            self._computes(running)
        self._copies: dict[int, list[list[Copy]]] = {part: [] for part in parts}  # of each row

    def next_rows(self) -> dict[int, int]:
        """The row that is next on each part that has one."""
        return {part: rows[-1] for part, rows in self.free.items() if rows}

    def is_coming(self, part: int, next_key: list[bytes]) -> bool:
        """Whether somebody is about to compute it."""
        return any(key in self.coming[part] for key in next_key)

    def give(self, running: Running, part: int, chain: list[Prefix]) -> bool:
        """Seats a waiting request, with what is known of its prompt; False: there are not the pages for it."""
        engine, row, tables = self.engine, self.free[part][-1], self.engine.tables
        for group, logical, page in (shared for prefix in chain for shared in prefix.shared):
            tables.pool(group, row, logical).share(page)
            tables.put(group, row, logical, page)
        last = chain[-1] if chain else Prefix(0, [], [])
        for group, logical, page in last.copied:  # the prefix itself may have to go
            tables.pool(group, row, logical).share(page)
        if not engine.grow(row, last.length, min(len(running.tokens) + 1, running.limit)):
            self._let_go(part, last.copied)
            tables.clear(row)
            return False
        if last.copied:
            self._copies[part].append([(g, n, page, tables.page(g, row, n)) for g, n, page in last.copied])
        self.free[part].pop()
        engine.seat(running, row, chain)
        self._computes(running)
        return True

    def copy(self) -> None:
        """Makes the copies, and lets go of what they were made from; for one row, or for room for all: few programs."""
        for part, of_rows in self._copies.items():
            copies = [copy for of_row in of_rows for copy in of_row]
            if copies:
                self.engine.copy(part, copies, 1 if len(of_rows) == 1 else self.engine.tables.rows_of_part)
                self._let_go(part, [copy[:3] for copy in copies])

    def _let_go(self, part: int, pages: list[tuple[int, int, int]]) -> None:
        for group, logical, page in pages:
            self.engine.release(part, group, logical, page)

    def _computes(self, running: Running) -> None:
        if not running.decodes:
            stride, size = self.engine.prefixes.stride, len(running.tokens)
            ends = (min((number + 1) * stride, size) for number in range(len(running.keys)))
            new = (key for key, end in zip(running.keys, ends, strict=True) if end > running.filled)
            self.coming[self.engine.part(running.row)].update(new)
