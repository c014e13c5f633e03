"""Requests that come and go, over rows of one cache: continuous batching with pages, prefix reuse and preemption."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsjax.data.tokenizer import Tokenizer
from dsjax.infer.admission import TooLong, admit
from dsjax.infer.decoding import decode, warm_up
from dsjax.infer.detokenize import Detokenizer
from dsjax.infer.engine import lanes_of, placed
from dsjax.infer.pages import Layout, Prefix, Prefixes, Tables, account, moves
from dsjax.infer.prefill import extend, features_of
from dsjax.infer.programs import block_widths, make_programs
from dsjax.infer.reading import at_start, later
from dsjax.infer.requests import Completion, Counts, Event, Request, Running, collected
from dsjax.infer.speculation import Behind, behind_shardings, num_drafting, num_kept
from dsjax.infer.written_out import is_better, written_out
from dsjax.nn.cache import PAGE_SIZE, Cache, cache_shardings
from dsjax.nn.masks import parts_of
from dsjax.nn.structure import Scopes
from dsjax.sharding import MeshConfig, host_array_to_global, make_mesh


class Engine:
    """Continues many requests at a time. ``submit`` them, then ``step`` until nothing is left, or ``stream`` one.

    A step admits what fits, computes up to a chunk of prompts that are not in the cache yet, and some tokens of all
    other requests: one, while there are prompts. What a request gets does not depend on what else there is. A request
    that could take over what another one is about to compute waits for that. If pages run out, first prefixes of old
    prompts go, then the request that came last: it is computed again later.

    Args:
        graph, params: the model; ``params`` may be numpy arrays.
        end_ids: tokens that end a request.
        max_length: positions of a request at the most, prompt included.
        batch_size: rows: continuations that are worked on at a time.
        num_positions: positions of all requests together, for which there are pages; None: all rows at full length.
        page_size: slots of a page; None: 16 on a CPU, elsewhere 64.
        chunk: positions of prompts that are computed in a step.
        steps: tokens decoded in a step, at the most.
        mesh: devices; None: the first one of this process.
        tokenizer: for texts, stop strings, and what a model with structure is told; None: there are only tokens.
        top_log_probs: how many of the likeliest tokens a request may ask for at each place.
        streams: somebody waits for first tokens: one at a time is decoded while a request has none. Else always
            ``steps``, which takes less time in all.
        pause: seconds without a token that decoding several at a time is not to exceed; None: any.
        draft: tokens that the model's modules of multi-token prediction draft in a step; 0: none.
        tell_experts: tell of each continuation which experts its positions went to; a model without experts has nothing
            to tell.

    Raises:
        UserError: there are no modules to draft with, the model can not take positions back, or is told of no text.
    """

    def __init__(
        self,
        graph: Any,
        params: Any,
        *,
        end_ids: Collection[int],
        max_length: int,
        batch_size: int = 8,
        num_positions: int | None = None,
        page_size: int | None = None,
        chunk: int = 256,
        steps: int = 8,
        mesh: Mesh | None = None,
        tokenizer: Tokenizer | None = None,
        top_log_probs: int = 0,
        streams: bool = True,
        pause: float | None = None,
        draft: int = 0,
        tell_experts: bool = False,
    ):
        mesh = mesh or make_mesh(MeshConfig(), jax.local_devices()[:1])
        there = placed(graph, params, mesh, batch_size)
        self.draft, self.num_drafting = draft, num_drafting(there.model.cfg, draft)
        self.end_ids, self.max_length, self.steps = frozenset(end_ids), max_length, steps
        self.tokenizer, self.top_log_probs = tokenizer, min(top_log_probs, there.model.cfg.vocab_size)
        self._at_start, self.scoped = at_start(there.model.cfg.structure, tokenizer), there.model.cfg.scoped
        self.reads = self._at_start is not None
        self.mesh, self.rules, self._placed = there.mesh, there.rules, there
        self.give(params)
        self.parts = tuple(math.prod(self.mesh.shape[a] for a in axes) for axes in (self.rules.batch, self.rules.slots))
        if page_size is None:  # a CPU reads small pages as fast, and less of them is unused
            page_size = 16 if self.mesh.devices.flat[0].platform == "cpu" else PAGE_SIZE
        stride, groups = page_size * self.parts[1], there.model.cfg.groups
        self.chunk = -(-chunk // stride) * stride
        # With states, or pages that are written again, a prefix can be taken up only where it was left for that.
        self._has_state = any(g.attention.segmented is not None or g.attention.conv_taps > 1 for g in groups)
        self.prefixes = Prefixes(self.chunk if self._has_state else stride, self.release, self.num_drafting)
        self.tell_experts = tell_experts and bool(there.model.cfg.experts())
        self.decisions = (there.model.cfg.decisions, there.model.cfg.decision_dtype)
        options = (draft, self.num_drafting, self.scoped, self.tell_experts)
        self.programs = make_programs(self.graph, self.mesh, self.rules, len(groups), *options)
        self._make_cache(there.model, there.dtype, batch_size, page_size, num_positions or batch_size * max_length)
        self.rows: list[Running | None] = [None] * batch_size
        self.waiting: deque[Running] = deque()
        self.counts, self._number, self._queues = Counts(), 0, dict[int, deque[Event]]()
        self._told: list[Event] = []  # in a run that has not returned
        self._given_up: dict[int, TooLong] = {}  # what has yet to be told to who waits for a request
        self.streams, self.pause, self._seconds = streams, pause, math.inf  # of a step

    def _make_cache(self, model: Any, dtype: Any, batch_size: int, page_size: int, num_positions: int) -> None:
        slots = self.max_length + max(self.chunk, 1 + self.draft)  # padding may stand behind the last position
        self.num_kept, layouts, pools = num_kept(self.draft, self.num_drafting), [], []
        for index, group in enumerate([*model.cfg.groups, *[model.cfg.groups[-1]] * self.num_drafting]):
            kept, _ = group.attention.cache_size(slots)
            columns = -(-kept // (page_size * self.parts[1]))  # of one device
            masks = tuple(dict.fromkeys(part for mask in group.attention.masks() for part in parts_of(mask)))
            again = self.num_kept if index >= len(model.cfg.groups) else 0
            layouts.append(Layout(masks, page_size, columns * self.parts[1], self.parts[1], again))
            pools.append(math.ceil(num_positions / self.max_length / self.parts[0] * columns))
        self.tables = Tables(layouts, batch_size, pools, self.parts[0])
        options = {"page_size": page_size, "parts": self.parts, "lanes": lanes_of(self.mesh), "pools": tuple(pools)}
        make = functools.partial(model.empty_cache, batch_size, slots, dtype, num_drafting=self.num_drafting, **options)
        shardings = cache_shardings(len(layouts), self.mesh, self.rules, Scopes(0, 0) if self.scoped else None)
        self.cache: Cache = jax.jit(make, out_shardings=shardings)()
        zeros = lambda: Behind(  # noqa: E731
            jnp.zeros((batch_size, model.cfg.vocab_size), jnp.float32),
            jnp.zeros((batch_size, self.num_kept, model.cfg.d_model), model.compute.dtype),
        )
        self.behind: Behind = jax.jit(zeros, out_shardings=behind_shardings(self.mesh, self.rules))()
        self.lengths_B = np.zeros(batch_size, np.int32)

    # ------------------------------------------------------------ weights

    def give(self, params: Any) -> None:
        """The weights to use from now on, of the same model; those that lie where they are wanted are not copied.

        Nothing may be running, and what is known of prompts must have been forgotten.
        """
        self.graph, self.params = self._placed.graph, self._placed.place(params)
        if is_better(self.mesh):
            self.graph, self.params = written_out(self.graph, self.params, self.mesh)

    def forget(self) -> None:
        """Lets go of the weights, which their owner may change then, and of what was computed with them."""
        self.params = None
        while self.prefixes.forget():
            pass

    # ------------------------------------------------------------ requests

    def submit(self, request: Request) -> int:
        """Takes a request; its number.

        Raises:
            UserError: the prompt is empty, leaves no room for a token, or has one that the model has not; a setting is
                out of range; it asks for what the engine was not made for; its grammar does not take the prompt.
        """
        request.check(self.max_length, self.top_log_probs, self.tokenizer is not None, self.draft)
        request.check_tokens(self.behind.logits_BV.shape[1])
        limit = min(len(request.prompt) + request.max_tokens, self.max_length)
        end_ids = self.end_ids if request.end_ids is None else frozenset(request.end_ids)
        self._number += 1
        reads = later(self._at_start, request.before, request.prompt)
        for sample in range(request.num_samples):
            text = None
            if self.tokenizer is not None:
                ahead = [*request.before, *request.prompt]
                text = Detokenizer(self.tokenizer, request.stop, before=ahead, healed=request.healed)
            tokens, within = list(request.prompt), request.constraint(end_ids)
            self.waiting.append(Running(self._number, sample, request, tokens, limit, end_ids, text, within, reads))
        return self._number

    def cancel(self, number: int) -> list[Event]:
        """Ends what is left of a request; its last events. One that has ended, or never was, has none."""
        events = []
        for running in [*self.waiting, *self.running()]:
            if running.number == number:
                if running.row >= 0:
                    self._vacate(running.row)
                else:
                    self.waiting.remove(running)
                events.append(running.cancelled())
        self._queue(events)
        return events

    def stream(self, request: Request) -> Iterator[Event]:
        """Submits a request, and yields what comes of it; other requests go on beside it.

        Who stops reading cancels it.

        Raises:
            UserError: as :meth:`submit`; or this request is too long for all pages together. That another one is, its
                own stream says, or the next :meth:`run`.
        """
        number, left = self.submit(request), request.num_samples
        queue = self._queues[number] = deque[Event]()
        try:
            while left:
                while queue:
                    event = queue.popleft()
                    if event.finish == "cancelled" and number in self._given_up:
                        raise self._given_up[number]
                    left -= event.ended
                    yield event
                if left:
                    self._go_on()
        finally:
            self.cancel(number)
            self._given_up.pop(number, None)
            del self._queues[number]

    def run(self) -> dict[int, list[Completion]]:
        """Steps until nothing is left; what came of each request from now on, a continuation for each sample.

        Raises:
            UserError: a request is too long for all pages together. It is given up; the others go on in the next call,
                which tells all that came of them.
        """
        self._raise_given_up()
        while self.busy:
            self._told += self._go_on()
            self._raise_given_up()
        events, self._told = self._told, []
        return collected(events)

    def _go_on(self) -> list[Event]:
        """A step; if a request is given up in it, that is kept for who waits for it."""
        try:
            return self.step()
        except TooLong as error:
            self._given_up[error.number] = error
            return []

    def _raise_given_up(self) -> None:
        """Tells of a request that was given up; the ones that are streamed say so themselves."""
        if given_up := self._given_up.keys() - self._queues.keys():
            raise self._given_up.pop(min(given_up))

    @property
    def busy(self) -> bool:
        """Whether a request is not done."""
        return bool(self.waiting) or any(self.rows)

    def step(self) -> list[Event]:
        """Admits requests, computes a chunk of prompts, and decodes some tokens; what came of it.

        Raises:
            UserError: a request is too long for all pages together; it is given up.
        """
        admit(self)
        self._prefill()
        events = self._decode()
        self._queue(events)
        if not self.busy:
            pages = account(self.tables, self.prefixes)
            assert pages.held == 0, f"a page is lost: {pages}"
        return events

    def _queue(self, events: Iterable[Event]) -> None:
        for event in events:
            if (queue := self._queues.get(event.request)) is not None:
                queue.append(event)

    def warm_up(self) -> None:
        """Compiles all that the engine can need, so that no request waits for it. Nothing may be running."""
        assert not self.busy
        for width in block_widths(self.chunk):
            for rows in sorted({1, self._rows_beside(width)}):
                extend(self, {}, width, rows)
        warm_up(self)
        state = self.programs.state(self.cache, 0)
        for taken in (None, state):
            self._place(0, [], 0, taken)
        allowed_V, of_row = np.ones(self.behind.logits_BV.shape[1], bool), self.programs.behind(self.behind, 0)
        self._restrict(0, of_row, allowed_V)
        for rows in sorted({1, self.tables.rows_of_part}):
            self.copy(0, [], rows)

    # ------------------------------------------------------------ pages

    def part(self, row: int) -> int:
        """The batch part that a row belongs to."""
        return row // self.tables.rows_of_part

    def release(self, part: int, group: int, logical: int, page: int) -> None:
        """Lets go of a page once; it is free when nobody holds it."""
        self.tables.pool(group, part * self.tables.rows_of_part, logical).release(page)

    def grow(self, row: int, start: int, end: int) -> bool:
        """Pages for a row, if need be from old prefixes."""
        while not self.tables.grow(row, start, end):
            if not self.prefixes.forget():
                return False
        return True

    def seat(self, running: Running, row: int, chain: list[Prefix]) -> None:
        """Gives a waiting request a row whose pages hold what is known of its prompt."""
        last = chain[-1] if chain else Prefix(0, [], [])
        self.waiting.remove(running)
        self.rows[row], running.row, running.filled = running, row, last.length
        # Behind a whole prompt its last hidden states are known, of which those are wanted by which modules lag.
        running.begun = max(last.length - self.num_drafting, 0) if running.decodes else last.length
        self.counts.reused += last.length
        running.begin_reading()
        if self.tell_experts:
            running.begin_telling(*self.decisions, [prefix.experts for prefix in chain])
        self._place(row, running.tokens, last.length, last.state)
        if running.decodes:
            self._set_behind(running, last.behind)

    def _place(self, row: int, tokens: list[int], length: int, state: Any) -> None:
        tokens_S = np.zeros(self.cache.tokens_BS.shape[1], np.int32)
        tokens_S[:length] = tokens[:length]
        told_SC = features_of(self.rows[row], len(tokens), length, len(tokens_S)) if self.scoped else None
        self.cache = self.programs.place(self.cache, row, tokens_S, state, told_SC)

    def _set_behind(self, running: Running, of_row: Behind | None = None) -> None:
        """What may come first: by what was kept of the prompt, or as computed; and by what the request allows."""
        allowed_V = np.ones(self.behind.logits_BV.shape[1], bool)
        if running.request.first_tokens is not None:
            first_V = running.request.first_tokens[: len(allowed_V)]
            allowed_V[:] = False
            allowed_V[: len(first_V)] = first_V
        elif of_row is None:
            return
        of_row = self.programs.behind(self.behind, running.row) if of_row is None else of_row
        unrestricted = self._restrict(running.row, of_row, allowed_V)
        running.unrestricted = None if running.request.first_tokens is None else unrestricted

    def _restrict(self, row: int, of_row: Behind, allowed_V: np.ndarray) -> tuple[Any, Any, Any]:
        given = (self.behind, row, of_row, allowed_V)
        self.behind, unrestricted = self.programs.set_behind(*given, num_top=self.top_log_probs)
        return unrestricted

    def copy(self, part: int, pages: list[tuple[int, int, int, int]], rows: int = 1) -> None:
        """Copies (group, logical page, from, to) of so many rows in the pools of one batch part."""
        put = functools.partial(host_array_to_global, mesh=self.mesh, spec=self.rules.spec("pages", None))
        layouts = self.tables.layouts
        by_group = [[page[1:] for page in pages if page[0] == group] for group in range(len(layouts))]
        copied = [moves(layout, own, part, self.parts[0], rows) for layout, own in zip(layouts, by_group, strict=True)]
        sources, targets = (tuple(put(of_group[end]) for of_group in copied) for end in range(2))
        self.cache = self.programs.copy(self.cache, sources, targets)

    def _vacate(self, row: int) -> None:
        self.tables.clear(row)
        self.rows[row], self.lengths_B[row] = None, 0

    def current(self) -> Cache:
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
        lengths_B = put(self.lengths_B.copy(), spec=rules.spec("batch"))
        return dataclasses.replace(self.cache, groups=groups, lengths_B=lengths_B)

    def running(self) -> list[Running]:
        """What has a row, the oldest first."""
        return sorted((r for r in self.rows if r is not None), key=lambda r: r.order)

    # ------------------------------------------------------------ computing

    def _rows_beside(self, width: int) -> int:
        """How many prompts of a batch part are computed at a time, if there are several."""
        return max(1, min(self.chunk // width, self.tables.rows_of_part))

    def _prefill(self) -> None:
        """Up to a chunk of the prompts on each batch part that are not in the cache yet, the oldest first."""
        room = self.chunk
        while room > 0 and (todo := [r for r in self.running() if not r.decodes]):
            counts = {r.row: min(self.chunk, len(r.tokens) - r.filled) for r in todo}
            by_part = [[r for r in todo if self.part(r.row) == part] for part in range(self.parts[0])]
            longest = max(counts[rs[0].row] for rs in by_part if rs)
            width = next(width for width in block_widths(self.chunk) if width >= longest)
            beside = self._rows_beside(width)
            chosen = [[r for r in rs if counts[r.row] <= width][:beside] for rs in by_part]
            rows = beside if max(map(len, chosen)) > 1 else 1
            parts = {r.row: r for rs in chosen for r in rs[:rows]}
            extend(self, {row: (r.tokens[r.filled :], counts[row]) for row, r in parts.items()}, width, rows)
            for row, r in parts.items():
                self.counts.prefilled += counts[row]
                r.filled += counts[row]
                self._remember(r, r.filled - counts[row])
                if r.decodes and r.num_new == 0:
                    self._set_behind(r)
            room -= rows * width

    def _remember(self, r: Running, start: int) -> None:
        """Keeps the prefixes that the positions from ``start`` on completed, if there is room."""
        stride, strides = self.prefixes.stride, self.prefixes.num_strides(len(r.tokens))
        for end in range((start // stride + 1) * stride, min(r.filled, strides * stride) + 1, stride):
            if not self._has_state or end == r.filled:
                self._keep(r, r.keys[: end // stride], end - stride, end)
        if r.decodes and len(r.keys) > strides:
            self._keep(r, r.keys, strides * stride, r.filled, self.programs.behind(self.behind, r.row))

    def _keep(self, r: Running, keys: list[bytes], start: int, end: int, behind: Behind | None = None) -> None:
        """Keeps the prefix of the last key, which adds the positions from ``start`` on, if there is room.

        Of a whole prompt, modules have yet to write the last positions: each who continues it will do so.
        """
        if keys[-1] in self.prefixes or (len(keys) > 1 and keys[-2] not in self.prefixes):
            return
        shared, open_pages = list[tuple[int, int]](), list[tuple[int, int]]()
        for group, layout in enumerate(self.tables.layouts):
            done = end if behind is None else max(end - self.num_drafting, 0)
            closed, before = layout.closed(done), layout.closed(start)
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
        part = self.part(r.row)
        if taken:
            self.copy(part, taken)
        for group, n in shared:
            self.tables.pool(group, r.row, n).share(self.tables.page(group, r.row, n))
        kept = [(group, n, self.tables.page(group, r.row, n)) for group, n in shared]
        state = self.programs.state(self.cache, r.row) if self._has_state else None
        told = None if r.experts_SLK is None else r.experts_SLK[start:end].copy()
        self.prefixes.add(part, keys, Prefix(end, kept, [(g, n, page) for g, n, _, page in taken], state, behind, told))

    def _decode(self) -> list[Event]:
        """Some tokens of all requests whose tokens so far are in the cache."""
        self._make_room()
        active = [r for r in self.running() if r.decodes]
        if not active:
            return []
        soon = self.streams and any(not r.decodes or r.num_new == 0 for r in self.running())
        left = max(r.limit - len(r.tokens) for r in active)
        at_once = self.steps if self.pause is None else int(self.pause / self._seconds)
        events, steps = [], 1 if soon else max(1, min(at_once, self.steps, left))
        begin = time.perf_counter()
        found, taken = decode(self, active, steps)
        self._seconds = min(self._seconds, (time.perf_counter() - begin) / taken)  # the first may have been compiled
        for r, decoded in zip(active, found, strict=True):
            events.append(event := r.add(decoded, self.draft))
            self.counts.drafts += event.drafts
            if event.ended:
                self._vacate(r.row)
            elif r.constraint is not None and r.constraint.no_end:
                self._preempt(r)  # its cache holds an end that was refused
        return events

    def _make_room(self) -> None:
        """Pages for what is decoded next, if need be from the requests that came last."""
        more = self.steps * (1 + self.draft)
        for r in self.running():
            while r.row >= 0 and r.decodes and not self.grow(r.row, r.filled, min(r.filled + more, r.limit)):
                sharing = [other for other in self.running() if self.part(other.row) == self.part(r.row)]
                if sharing == [r]:
                    self.cancel(r.number)  # the others go on
                    raise TooLong(r)
                self._preempt(sharing[-1])

    def _preempt(self, r: Running) -> None:
        """Takes the row of a request, which is computed again later."""
        self._vacate(r.row)
        r.row, r.filled, r.keys_of_part = -1, 0, {}
        self.waiting.appendleft(r)
        self.counts.preempted += 1
