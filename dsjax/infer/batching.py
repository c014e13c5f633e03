"""Requests that come and go, over rows of one cache: continuous batching with pages, prefix reuse and preemption."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dsjax.config import UserError
from dsjax.infer.engine import lanes_of, placed
from dsjax.infer.pages import Layout, Prefix, Prefixes, Tables
from dsjax.infer.programs import make_programs
from dsjax.infer.sampling import RowSampling, SamplingConfig
from dsjax.nn.cache import PAGE_SIZE, Cache, cache_shardings
from dsjax.nn.masks import parts_of
from dsjax.sharding import MeshConfig, host_array_to_global, make_mesh
from pallas_kernels.segmented_attention import Segments


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be continued.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: new tokens at the most.
        sampling: how to choose.
        seed: of the choices: the same tokens, alone or among others.
        first_tokens: a mask of the V tokens that may come first (see :func:`dsjax.infer.engine.heal`).
    """

    prompt: Sequence[int]
    max_tokens: int = 256
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    first_tokens: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Event:
    """New tokens of a request, the log-probability that the model gave each, and whether it has ended."""

    request: int
    tokens: list[int]
    log_probs: list[float]
    ended: bool


@dataclasses.dataclass
class _Running:
    """A request in the engine: its tokens so far, and how many of them are in the cache, if it has a row."""

    number: int
    request: Request
    tokens: list[int]
    limit: int
    row: int = -1
    filled: int = 0
    keys: list[bytes] = dataclasses.field(default_factory=list)

    @property
    def num_new(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def decodes(self) -> bool:
        return self.filled == len(self.tokens)


@dataclasses.dataclass
class Counts:
    """What an engine did: tokens computed in prefill and taken over from earlier prompts, requests preempted."""

    prefilled: int = 0
    reused: int = 0
    preempted: int = 0


class Engine:
    """Continues many requests at a time. ``submit`` them, then ``step`` until nothing is left, or ``stream`` one.

    A step admits what fits, computes a chunk of a prompt that is not in the cache yet, and some tokens of all other
    requests. What a request gets does not depend on what else there is. If pages run out, first prefixes of old prompts
    go, then the request that came last: it is computed again later.

    Args:
        graph, params: the model; ``params`` may be numpy arrays.
        end_id: ends a request.
        max_length: positions of a request at the most, prompt included.
        batch_size: rows: requests that are worked on at a time.
        num_positions: positions of all requests together, for which there are pages; None: all rows at full length.
        page_size: slots of a page.
        chunk: positions of a prompt that are computed at a time.
        steps: tokens decoded in a step.
        mesh: devices; None: the first one of this process.
    """

    def __init__(
        self,
        graph: Any,
        params: Any,
        *,
        end_id: int,
        max_length: int,
        batch_size: int = 8,
        num_positions: int | None = None,
        page_size: int = PAGE_SIZE,
        chunk: int = 256,
        steps: int = 8,
        mesh: Mesh | None = None,
    ):
        mesh = mesh or make_mesh(MeshConfig(), jax.local_devices()[:1])
        there = placed(graph, params, mesh, batch_size)
        self.end_id, self.max_length, self.steps = end_id, max_length, steps
        self.mesh, self.rules, self.params = there.mesh, there.rules, there.place(params)
        self.parts = tuple(math.prod(self.mesh.shape[a] for a in axes) for axes in (self.rules.batch, self.rules.slots))
        stride, groups = page_size * self.parts[1], there.model.cfg.groups
        self.chunk = -(-chunk // stride) * stride
        # With states, or pages that are written again, a prefix can be taken up only where it was left for that.
        self._has_state = any(g.attention.segmented is not None or g.attention.conv_taps > 1 for g in groups)
        self.prefixes = Prefixes(self.chunk if self._has_state else stride, self._release)
        self.programs = make_programs(graph, self.mesh, self.rules, len(groups))
        self._make_cache(there.model, there.dtype, batch_size, page_size, num_positions or batch_size * max_length)
        self.rows: list[_Running | None] = [None] * batch_size
        self.waiting: deque[_Running] = deque()
        self.counts, self._number, self._queues = Counts(), 0, dict[int, deque[Event]]()

    def _make_cache(self, model: Any, dtype: Any, batch_size: int, page_size: int, num_positions: int) -> None:
        slots = self.max_length + max(self.chunk, self.steps)  # padding may stand behind the last position
        layouts, pools = [], []
        for group in model.cfg.groups:
            kept, _ = group.attention.cache_size(slots)
            columns = -(-kept // (page_size * self.parts[1]))  # of one device
            masks = tuple(part for mask in group.attention.masks() for part in parts_of(mask))
            layouts.append(Layout(masks, page_size, columns * self.parts[1], self.parts[1]))
            pools.append(math.ceil(num_positions / self.max_length / self.parts[0] * columns))
        self.tables = Tables(layouts, batch_size, pools, self.parts[0])
        options = {"page_size": page_size, "parts": self.parts, "lanes": lanes_of(self.mesh), "pools": tuple(pools)}
        self._places = cache_shardings(len(layouts), self.mesh, self.rules)
        make = functools.partial(model.empty_cache, batch_size, slots, dtype, **options)
        self.cache: Cache = jax.jit(make, out_shardings=self._places)()
        logits = NamedSharding(self.mesh, self.rules.spec("batch", "vocab"))
        zeros = functools.partial(jnp.zeros, (batch_size, model.cfg.vocab_size), jnp.float32)
        self.logits_BV = jax.jit(zeros, out_shardings=logits)()
        self.lengths_B = np.zeros(batch_size, np.int32)

    # ------------------------------------------------------------ requests

    def submit(self, request: Request) -> int:
        """Takes a request; its number.

        Raises:
            UserError: the prompt is empty, or leaves no room for a token.
        """
        length = len(request.prompt)
        if length == 0:
            raise UserError("a prompt is empty; give at least one token")
        if length >= self.max_length:
            raise UserError(f"a prompt has {length} tokens; the engine holds {self.max_length} with what it generates")
        limit = min(length + request.max_tokens, self.max_length)
        self._number += 1
        self.waiting.append(_Running(self._number, request, list(request.prompt), limit))
        return self._number

    def stream(self, request: Request) -> Iterator[Event]:
        """Submits a request, and yields what comes of it; other requests go on beside it."""
        number = self.submit(request)
        queue = self._queues[number] = deque[Event]()
        try:
            while True:
                while queue:
                    yield (event := queue.popleft())
                    if event.ended:
                        return
                self.step()
        finally:
            del self._queues[number]

    def run(self) -> dict[int, list[int]]:
        """Steps until nothing is left; the new tokens of each request that ended."""
        tokens: dict[int, list[int]] = {}
        while self.busy:
            for event in self.step():
                tokens.setdefault(event.request, []).extend(event.tokens)
        return tokens

    @property
    def busy(self) -> bool:
        """Whether a request is not done."""
        return bool(self.waiting) or any(self.rows)

    def step(self) -> list[Event]:
        """Admits requests, computes a chunk of prompts, and decodes some tokens; what came of it."""
        self._admit()
        self._prefill()
        events = self._decode()
        for event in events:
            if (queue := self._queues.get(event.request)) is not None:
                queue.append(event)
        return events

    # ------------------------------------------------------------ pages

    def _part(self, row: int) -> int:
        return row // self.tables.rows_of_part

    def _release(self, part: int, group: int, logical: int, page: int) -> None:
        self.tables.pool(group, part * self.tables.rows_of_part, logical).release(page)

    def _grow(self, row: int, start: int, end: int) -> bool:
        """Pages for a row, if need be from old prefixes."""
        while not self.tables.grow(row, start, end):
            if not self.prefixes.forget():
                return False
        return True

    def _admit(self) -> None:
        """Gives rows to the requests that came first, while there are rows and pages."""
        while self.waiting and None in self.rows:
            running = self.waiting[0]
            rows = {self._part(row): row for row in reversed(range(len(self.rows))) if self.rows[row] is None}
            # One token at least is computed: somebody must say what comes next.
            keys = {part: self.prefixes.keys(part, running.tokens[:-1]) for part in rows}
            part = max(rows, key=lambda part: len(self.prefixes.find(keys[part])))
            row, chain = rows[part], self.prefixes.find(keys[part])
            for group, logical, page in (shared for prefix in chain for shared in prefix.shared):
                self.tables.pool(group, row, logical).share(page)
                self.tables.put(group, row, logical, page)
            start, copied = (chain[-1].length, chain[-1].copied) if chain else (0, [])
            for group, logical, page in copied:  # the prefix itself may have to go
                self.tables.pool(group, row, logical).share(page)
            fits = self._grow(row, start, len(running.tokens) + 1)
            if fits:
                self._copy(part, [(g, n, page, self.tables.page(g, row, n)) for g, n, page in copied])
            for group, logical, page in copied:
                self.tables.pool(group, row, logical).release(page)
            if not fits:
                self.tables.clear(row)
                if chain and not any(self.rows):
                    continue  # without it there is more room
                if not any(self.rows):
                    raise self._too_long(running)
                return
            self.waiting.popleft()
            self.rows[row], running.row, running.filled = running, row, start
            running.keys = self.prefixes.keys(part, running.tokens)
            self.counts.reused += start
            tokens_S = np.zeros(self.cache.tokens_BS.shape[1], np.int32)
            tokens_S[:start] = running.tokens[:start]
            self.cache = self.programs.place(self.cache, row, tokens_S, chain[-1].state if chain else None)

    def _too_long(self, r: _Running) -> UserError:
        return UserError(f"a request has {len(r.tokens)} tokens, more than there are pages for; raise num_positions")

    def _copy(self, part: int, pages: list[tuple[int, int, int, int]]) -> None:
        """Copies (group, logical page, from, to) in the pools of one batch part."""
        if not pages:
            return
        sources, targets = [], []
        for group, layout in enumerate(self.tables.layouts):
            of_group = [page for page in pages if page[0] == group]
            width = max(1, -(-max(self._copied_pages(layout), len(of_group)) // layout.parts) + 1)
            moves = np.full((2, self.parts[0] * layout.parts, width), -1, np.int32)
            used = [0] * layout.parts
            for _, logical, source, target in of_group:
                device = logical % layout.parts
                moves[:, part * layout.parts + device, used[device]] = source, target
                used[device] += 1
            spec = self.rules.spec("pages", None)
            sources.append(host_array_to_global(moves[0], self.mesh, spec))
            targets.append(host_array_to_global(moves[1], self.mesh, spec))
        self.cache = self.programs.copy(self.cache, tuple(sources), tuple(targets))

    @staticmethod
    def _copied_pages(layout: Layout) -> int:
        """How many pages of a group a prefix copies at the most: so that few shapes are compiled."""
        heads = [-(-(m.size - m.window) // layout.page_size) for m in layout.masks if isinstance(m, Segments)]
        return max(heads, default=0) + 2

    def _vacate(self, row: int) -> None:
        self.tables.clear(row)
        self.rows[row], self.lengths_B[row] = None, 0

    def _current(self) -> Cache:
        """The cache with the tables and lengths that the host knows."""
        put, rules = functools.partial(host_array_to_global, mesh=self.mesh), self.rules
        groups = tuple(
            dataclasses.replace(
                group,
                pages=dataclasses.replace(group.pages, table_BJ=put(table.copy(), spec=rules.spec("batch", "slots"))),
            )
            for group, table in zip(self.cache.groups, self.tables.tables, strict=True)
        )
        for running in self.running():
            self.lengths_B[running.row] = running.filled
        return Cache(groups, put(self.lengths_B.copy(), spec=rules.spec("batch")), self.cache.tokens_BS)

    def running(self) -> list[_Running]:
        """What has a row, the oldest first."""
        return sorted((r for r in self.rows if r is not None), key=lambda r: r.number)

    # ------------------------------------------------------------ computing

    def _prefill(self) -> None:
        """A chunk of the oldest prompt on each batch part that is not in the cache yet."""
        first = {self._part(r.row): r for r in reversed(self.running()) if not r.decodes}
        if not first:
            return
        counts = {part: min(self.chunk, len(r.tokens) - r.filled) for part, r in first.items()}
        width = min(self.chunk, max(16, 1 << (max(counts.values()) - 1).bit_length()))  # few shapes, few compilations
        tokens_RT, ids_RT = (np.zeros((self.parts[0], width), np.int32) for _ in range(2))
        rows_R = np.arange(self.parts[0], dtype=np.int32) * self.tables.rows_of_part  # where nothing is to be done: any
        for part, r in first.items():
            rows_R[part] = r.row
            tokens_RT[part, : counts[part]] = r.tokens[r.filled : r.filled + counts[part]]
            ids_RT[part, : counts[part]] = 1
        put = functools.partial(host_array_to_global, mesh=self.mesh, spec=self.rules.spec("batch"))
        self.logits_BV, self.cache = self.programs.extend(
            self.params, *map(put, (tokens_RT, ids_RT, rows_R)), self.logits_BV, self._current()
        )
        for part, r in first.items():
            self.counts.prefilled += counts[part]
            r.filled += counts[part]
            self._remember(part, r, r.filled - counts[part])
            if r.decodes and r.num_new == 0 and r.request.first_tokens is not None:
                allowed_V = np.zeros(self.logits_BV.shape[1], bool)
                allowed_V[: len(r.request.first_tokens)] = r.request.first_tokens
                self.logits_BV = self.programs.restrict(self.logits_BV, r.row, allowed_V)

    def _remember(self, part: int, r: _Running, start: int) -> None:
        """Keeps the prefixes that the positions from ``start`` on completed, if there is room."""
        stride = self.prefixes.stride
        for end in range((start // stride + 1) * stride, r.filled + 1, stride):
            keys = r.keys[: end // stride]
            if keys[-1] in self.prefixes or (self._has_state and end != r.filled):
                continue
            if len(keys) > 1 and keys[-2] not in self.prefixes:
                return
            shared, open_pages = list[tuple[int, int]](), list[tuple[int, int]]()
            for group, layout in enumerate(self.tables.layouts):
                closed, before = layout.closed(end), layout.closed(end - stride)
                shared += [(group, n) for n in closed if n not in before]
                open_pages += [(group, n) for n in layout.needed(end, end) if n not in closed]
            taken: list[tuple[int, int, int, int]] = []
            for group, n in open_pages:
                pool = self.tables.pool(group, r.row, n)
                if not pool.num_free:
                    for g, logical, _, page in taken:
                        self.tables.pool(g, r.row, logical).release(page)
                    return
                taken.append((group, n, self.tables.page(group, r.row, n), pool.take()))
            self._copy(part, taken)
            for group, n in shared:
                self.tables.pool(group, r.row, n).share(self.tables.page(group, r.row, n))
            kept = [(group, n, self.tables.page(group, r.row, n)) for group, n in shared]
            state = self.programs.state(self.cache, r.row) if self._has_state else None
            self.prefixes.add(part, keys, Prefix(end, kept, [(g, n, page) for g, n, _, page in taken], state))

    def _decode(self) -> list[Event]:
        """Some tokens of all requests whose tokens so far are in the cache."""
        self._make_room()
        active = [r for r in self.running() if r.decodes]
        if not active:
            return []
        B = len(self.rows)
        active_B, seeds_B, index_B = np.zeros(B, bool), np.zeros(B, np.uint32), np.zeros(B, np.int32)
        configs = [SamplingConfig(temperature=0.0)] * B
        for r in active:
            active_B[r.row], seeds_B[r.row], index_B[r.row] = True, r.request.seed, r.num_new
            configs[r.row] = r.request.sampling
        put = functools.partial(host_array_to_global, mesh=self.mesh, spec=self.rules.spec("batch"))
        rows = jax.tree.map(put, (active_B, seeds_B, index_B, RowSampling.of(configs)))
        tokens_BS, log_probs_BS, self.logits_BV, self.cache = self.programs.decode(
            self.params, self.logits_BV, self._current(), *rows, steps=self.steps
        )
        tokens_BS, log_probs_BS, events = np.asarray(tokens_BS), np.asarray(log_probs_BS), []
        for r in active:
            new = tokens_BS[r.row, : r.limit - len(r.tokens)].tolist()
            ended = len(r.tokens) + len(new) == r.limit
            if self.end_id in new:
                new, ended = new[: new.index(self.end_id)], True
            r.tokens += new
            r.filled = len(r.tokens)
            events.append(Event(r.number, new, log_probs_BS[r.row, : len(new)].tolist(), ended))
            if ended:
                self._vacate(r.row)
        return events

    def _make_room(self) -> None:
        """Pages for what is decoded next, if need be from the requests that came last."""
        for r in self.running():
            while r.row >= 0 and r.decodes and not self._grow(r.row, r.filled, min(r.filled + self.steps, r.limit)):
                sharing = [other for other in self.running() if self._part(other.row) == self._part(r.row)]
                if sharing == [r]:
                    raise self._too_long(r)
                last = sharing[-1]
                self._vacate(last.row)
                last.row, last.filled = -1, 0
                self.waiting.appendleft(last)
                self.counts.preempted += 1
