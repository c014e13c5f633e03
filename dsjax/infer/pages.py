"""Who has which pages: free lists, owners, the tables of rows, and prompts whose pages later ones take over.

All of it is bookkeeping on the host. Pages of a cache (:class:`dsjax.nn.cache.Pages`) are numbered in the pool of the
device that they lie on; a device's pool is one of a batch part (its rows) and a slot part (its slots of a row).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from dsjax.nn.cache import num_slots
from dsjax.nn.masks import AttentionMask, Causal
from pallas_kernels.segmented_attention import Segments


class Pool:
    """Pages of one pool, each free or with a number of owners. All calls take constant time."""

    def __init__(self, num_pages: int):
        self._free = list(range(num_pages - 1, -1, -1))
        self._owners = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def owners(self) -> Sequence[int]:
        """How many each page has."""
        return self._owners

    def take(self) -> int:
        """A free page, with one owner.

        Raises:
            IndexError: there is none.
        """
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more owner of a page that has some."""
        assert self._owners[page] > 0, f"page {page} has no owner"
        self._owners[page] += 1

    def release(self, page: int) -> None:
        """One owner less; the last one leaves the page free."""
        assert self._owners[page] > 0, f"page {page} has no owner"
        self._owners[page] -= 1
        if not self._owners[page]:
            self._free.append(page)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which logical pages a row needs in one layer group.

    Attributes:
        masks: what its layers see in turn.
        page_size: slots of a page.
        columns: logical pages of a row at the most.
        parts: devices that share a row's slots.
        behind: positions before the first one that is asked about which are computed again.
    """

    masks: tuple[AttentionMask, ...]
    page_size: int
    columns: int
    parts: int = 1
    behind: int = 0

    def needed(self, start: int, end: int) -> range:
        """Logical pages that hold what positions from ``start`` on see, with all positions before ``end`` written."""
        last = max((num_slots(mask, end) for mask in self.masks), default=0)
        first = 0
        if all(isinstance(mask, Causal) and mask.window is not None for mask in self.masks):
            window = max(mask.window or 0 for mask in self.masks if isinstance(mask, Causal))
            first = max(start - self.behind - window + 1, 0) // self.page_size
        return range(first, -(-last // self.page_size))

    def closed(self, length: int) -> range:
        """Logical pages that are full with ``length`` positions and are never written again."""
        first, full = 0, []
        for mask in self.masks:
            if not isinstance(mask, Segments):
                full.append(length)
                continue
            head = mask.size - mask.window
            whole, offset = divmod(length + mask.shift, mask.size)
            first = max(first, -(-head // self.page_size))
            full.append(head + whole * mask.window + max(offset - head, 0))
        return range(first, max(min(full) // self.page_size, first))

    @property
    def num_copied(self) -> int:
        """How many pages that go on being written a row has at the most: a prefix copies those.

        They are those of the head, and of whole tails from the first that some layer has not filled to the last that
        some layer has begun.
        """
        cuts = [mask for mask in self.masks if isinstance(mask, Segments)]
        if not cuts:
            return 2
        head, tail, shifts = cuts[0].size - cuts[0].window, cuts[0].window, [cut.shift for cut in cuts]
        tails = tail + max(max(shifts) - min(shifts) - head, 0)  # so far apart, layers are in two of them
        return -(-head // self.page_size) - (-tails // self.page_size) + 2

    def column(self, logical: int) -> int:
        """Where a logical page stands in the table of a row: those of one device side by side."""
        return logical % self.parts * (self.columns // self.parts) + logical // self.parts


class Tables:
    """The pages of all rows, by layer group.

    Args:
        layouts: of the groups.
        batch: rows.
        pools: pages of each device's pool, by group.
        parts: devices over which rows are cut.
    """

    def __init__(self, layouts: Sequence[Layout], batch: int, pools: Sequence[int], parts: int = 1):
        self.layouts = tuple(layouts)
        self.rows_of_part = batch // parts
        self.tables = [np.full((batch, layout.columns), -1, np.int32) for layout in layouts]
        self.pools = [
            [[Pool(size) for _ in range(layout.parts)] for _ in range(parts)]
            for layout, size in zip(layouts, pools, strict=True)
        ]
        self._has = [[range(0)] * len(layouts) for _ in range(batch)]  # among these are all pages of a row
        self._grown = [[0] * len(layouts) for _ in range(batch)]  # what is needed in front of it is there

    def pool(self, group: int, row: int, logical: int) -> Pool:
        """The pool in which a logical page of a row lies."""
        return self.pools[group][row // self.rows_of_part][logical % self.layouts[group].parts]

    def page(self, group: int, row: int, logical: int) -> int:
        """The page of a logical page; -1: none."""
        return int(self.tables[group][row, self.layouts[group].column(logical)])

    def put(self, group: int, row: int, logical: int, page: int) -> None:
        """Gives a row a page that it owns from now on."""
        assert self.page(group, row, logical) == -1, "a page would be lost"
        self.tables[group][row, self.layouts[group].column(logical)] = page
        has = self._has[row][group]
        self._has[row][group] = range(min(has.start, logical) if has else logical, max(has.stop, logical + 1))

    def drop(self, group: int, row: int, logical: int) -> None:
        """Gives a page back, if the row has it."""
        if (page := self.page(group, row, logical)) >= 0:
            self.tables[group][row, self.layouts[group].column(logical)] = -1
            self.pool(group, row, logical).release(page)

    def grow(self, row: int, start: int, end: int) -> bool:
        """Gives a row what positions ``start`` ... ``end`` need, and takes what they do not; False: nothing is done.

        Constant time for each page that comes or goes.
        """
        needed = [layout.needed(start, end) for layout in self.layouts]
        missing, wanted = list[tuple[int, int]](), Counter[int]()
        for group, logicals in enumerate(needed):
            for logical in range(max(logicals.start, self._grown[row][group]), logicals.stop):
                if self.page(group, row, logical) < 0:
                    pool = self.pool(group, row, logical)
                    missing.append((group, logical))
                    wanted[id(pool)] += 1
                    if wanted[id(pool)] > pool.num_free:
                        return False
        for group, logical in missing:
            self.put(group, row, logical, self.pool(group, row, logical).take())
        for group, logicals in enumerate(needed):
            has = self._has[row][group]
            for logical in range(has.start, min(has.stop, logicals.start)):
                self.drop(group, row, logical)
            self._has[row][group] = range(max(has.start, logicals.start), has.stop)
            self._grown[row][group] = max(self._grown[row][group], logicals.stop)
        return True

    def clear(self, row: int) -> None:
        """Gives all pages of a row back."""
        for group, has in enumerate(self._has[row]):
            for logical in has:
                self.drop(group, row, logical)
            self._has[row][group], self._grown[row][group] = range(0), 0


def moves(
    layout: Layout, pages: Sequence[tuple[int, int, int]], part: int, num_parts: int, rows: int = 1
) -> Int[np.ndarray, "2 devices C"]:
    """Which pages are copied from and to in the pools of all devices, for (logical page, from, to) of a batch part.

    -1: none. There is room for what so many rows copy at the most, so that few shapes are compiled.
    """
    width = rows * max(1, -(-layout.num_copied // layout.parts) + 1)
    found, used = np.full((2, num_parts * layout.parts, width), -1, np.int32), [0] * layout.parts
    for logical, source, target in pages:
        device = logical % layout.parts
        found[:, part * layout.parts + device, used[device]] = source, target
        used[device] += 1
    return found


# ---------------------------------------------------------------- prefixes


@dataclasses.dataclass
class Prefix:
    """What is kept of the first ``length`` tokens of a prompt, on the devices of one batch part.

    Attributes:
        length: tokens.
        shared: (group, logical page, page) of pages that were closed since the prefix before it.
        copied: (group, logical page, page) of copies of pages that go on being written.
        state: whatever else belongs to a row; None: nothing does.
        behind: what is known behind a whole prompt (:class:`dsjax.infer.speculation.Behind`); None: it must be computed
            again.
        experts: what routers decided of the tokens since the prefix before it, (tokens, L, K); None: it is not told.
    """

    length: int
    shared: list[tuple[int, int, int]]
    copied: list[tuple[int, int, int]]
    state: Any = None
    behind: Any = None
    experts: Int[np.ndarray, "S L K"] | None = None


class Prefixes:
    """Prefixes by a hash of their tokens, at multiples of ``stride``; the ones not used for longest go first.

    What modules keep of a position depends on up to ``ahead`` tokens behind it: so those must be the same, too.
    """

    def __init__(self, stride: int, release: Callable[[int, int, int, int], None], ahead: int = 0):
        """``release(part, group, logical, page)`` gives a page back."""
        self.stride, self._release, self.ahead = stride, release, ahead
        self._known: OrderedDict[bytes, tuple[int, Prefix]] = OrderedDict()

    def keys(self, part: int, tokens: Sequence[int], *, whole: bool = False, salt: bytes = b"") -> list[bytes]:
        """One for each prefix of whole strides, on a batch part, and one for all of it; each depends on all before.

        ``salt``: what else must be the same.
        """
        key, keys, begin = hashlib.sha256(f"{part}/".encode() + salt).digest(), [], 0
        for number in range(1, self.num_strides(len(tokens)) + 1):
            end = number * self.stride + self.ahead
            block, begin = np.asarray(tokens[begin:end], np.int32).tobytes(), end
            key = hashlib.sha256(key + block).digest()
            keys.append(key)
        if whole:
            rest = np.asarray(tokens[len(keys) * self.stride :], np.int32).tobytes()
            keys.append(hashlib.sha256(key + rest + b"whole").digest())
        return keys

    def num_strides(self, length: int) -> int:
        """How many prefixes of whole strides so many tokens have."""
        return max(length - self.ahead, 0) // self.stride

    def find(self, keys: Sequence[bytes]) -> list[Prefix]:
        """The known ones from the first on, each of which continues the one before."""
        num = next((i for i, key in enumerate(keys) if key not in self._known), len(keys))
        self._touch(keys[:num])
        return [self._known[key][1] for key in keys[:num]]

    def add(self, part: int, keys: Sequence[bytes], prefix: Prefix) -> None:
        """Keeps the prefix of the last key; its pages are owned from now on."""
        assert keys[-1] not in self._known
        self._known[keys[-1]] = (part, prefix)
        self._touch(keys)

    def _touch(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):  # so that a prefix goes before the one that it continues
            if key in self._known:
                self._known.move_to_end(key)

    def forget(self) -> bool:
        """Lets the prefix go that was not used for longest; False: there is none."""
        if not self._known:
            return False
        _, (part, prefix) = self._known.popitem(last=False)
        for group, logical, page in (*prefix.shared, *prefix.copied):
            self._release(part, group, logical, page)
        return True

    def pages(self) -> Iterator[tuple[int, int, int, int]]:
        """(part, group, logical page, page) of all that they own."""
        for part, prefix in self._known.values():
            for owned in (*prefix.shared, *prefix.copied):
                yield part, *owned

    def __contains__(self, key: bytes) -> bool:
        return key in self._known

    def __len__(self) -> int:
        return len(self._known)


# ---------------------------------------------------------------- accounts


@dataclasses.dataclass(frozen=True)
class PageCounts:
    """All pages of an engine: free, owned by prefixes alone, and held by rows."""

    free: int
    evictable: int
    held: int


def account(tables: Tables, prefixes: Prefixes) -> PageCounts:
    """Who has all pages; free + evictable + held is what there is.

    Raises:
        AssertionError: a page has more or fewer owners than own it: it would be lost, or given out twice.
    """
    held, kept = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for group, layout in enumerate(tables.layouts):
        for row in range(len(tables.tables[group])):
            for logical in range(layout.columns):
                if (page := tables.page(group, row, logical)) >= 0:
                    held[id(tables.pool(group, row, logical)), page] += 1
    for part, group, logical, page in prefixes.pages():
        kept[id(tables.pool(group, part * tables.rows_of_part, logical)), page] += 1
    owners, free = held + kept, 0
    for pool in (pool for group in tables.pools for part in group for pool in part):
        free += pool.num_free
        for page, number in enumerate(pool.owners):
            found = owners.pop((id(pool), page), 0)
            assert found == number, f"page {page} has {number} owners; {found} own it"
    return PageCounts(free, len(kept.keys() - held.keys()), len(held))
