"""Several tensors at a time, no more than memory has room for."""

from __future__ import annotations

import collections
import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

WORKERS = min(4, os.cpu_count() or 1)


def each(work: Callable[[T], R], items: Iterable[tuple[T, int]], most: int) -> Iterator[tuple[T, R]]:
    """``work`` done with every item, in threads; items and results in their order.

    Args:
        work: what is done; it spends its time in NumPy, files and hashes, which let other threads run.
        items: each with the bytes that it takes.
        most: bytes of the items under way at any time; one that is larger goes alone.
    """
    pending: collections.deque[tuple[T, int, concurrent.futures.Future[R]]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        try:
            for item, size in items:
                while pending and (len(pending) >= WORKERS or size + sum(n for _, n, _ in pending) > most):
                    first, _, future = pending.popleft()
                    yield first, future.result()
                pending.append((item, size, pool.submit(work, item)))
            while pending:
                first, _, future = pending.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
