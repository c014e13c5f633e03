"""Verified rewards: what a program does in the sandbox, and how it reads beside a solution that is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dsjax import hosts
from dsjax.rl.sandbox import Program, Sandbox


def shares_passed(sandbox: Sandbox, programs: Sequence[Program]) -> list[float | None]:
    """The share of each program's hidden tests that it passes, from 0 to 1; None: nothing is known of it.

    A program that is there several times is run once. Of several processes the first one's word counts for all, so that
    they go on with the same numbers.
    """
    keys = [(p.code, p.entry_point, repr(p.tests)) for p in programs]
    first = {key: number for number, key in reversed(list(enumerate(keys)))}  # where each stands for the first time
    chosen = sorted(first.values())
    verdicts = sandbox.check([programs[i] for i in chosen] if not hosts.index() else [])
    shares = [None if v.passed is None else v.tests_passed / max(v.tests_total, 1) for v in verdicts]
    by_key = dict(zip([keys[i] for i in chosen], hosts.exchange("tests passed", shares)[0], strict=True))
    return [by_key[key] for key in keys]


def reward(
    passed: float | None, text: str, reference: str, likeness: Callable[[str, str], float], likeness_share: float
) -> float | None:
    """(1 - w) passed + w likeness(text, reference), from 0 to 1, or None if nothing is known of the tests.

    Args:
        passed: share of the tests.
        text: what was written.
        reference: a right one; empty: none is known, and tests alone count.
        likeness: of two texts, from 0 to 1.
        likeness_share: w. With 1 tests do not count.
    """
    share = likeness_share if reference else 0.0
    if passed is None and share < 1:
        return None
    return (1 - share) * (passed or 0.0) + (share * likeness(text, reference) if share else 0.0)
