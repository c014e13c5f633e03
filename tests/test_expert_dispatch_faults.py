"""Faults planted in expert dispatch, one at a time: the check of tests/dispatch_cases.py catches each.

A fault is a snippet of a file, which must stand there exactly once, and what stands there instead. Where the code moves
on, its faults move with it.
"""

from __future__ import annotations

import pathlib

import pytest
from dispatch_cases import CASES, check_variant
from planting import Fault

SHARED = (
    Fault(
        "a bias counts in the score too",
        "route.py",
        "scores_TE[:, None], 0), axis=2)",
        "choice_TE[:, None], 0), axis=2)",
        "bias",
    ),
    Fault(
        "NaN is the best score",
        "route.py",
        "jnp.where(jnp.isnan(choice_TE), -jnp.inf,",
        "jnp.where(jnp.isnan(choice_TE), jnp.inf,",
        "special",
    ),
    Fault(
        "-0 comes behind 0",
        "route.py",
        "jnp.where(choice_TE == 0, 0, choice_TE)",
        "choice_TE",
        "zeros of both signs",
        "tpu",
    ),
    Fault(
        "scores have the gradient of the next choice",
        "route.py",
        "dchoice.scores_TX[..., None]",
        "jnp.roll(dchoice.scores_TX, 1, axis=1)[..., None]",
        "no multiples",
    ),
    Fault(
        "a limit lets one more in",
        "plan.py",
        "jnp.minimum(counts_E, jnp.maximum(limit_E, 0))",
        "jnp.minimum(counts_E, jnp.maximum(limit_E + 1, 0))",
        "limited",
    ),
    Fault(
        "groups begin where those without a limit would",
        "plan.py",
        "starts_E = jnp.cumsum(sizes_E) - sizes_E",
        "starts_E = jnp.cumsum(counts_E) - counts_E",
        "limited",
    ),
    Fault(
        "pairs that go nowhere go to the first row",
        "plan.py",
        "start_TX + position_TX, R)",
        "start_TX + position_TX, 0)",
        "limited",
    ),
    Fault(
        "experts elsewhere are taken for the first one here",
        "plan.py",
        "experts_TX[..., None] == jnp.arange(num_experts, dtype=experts_TX.dtype)",
        "jnp.maximum(experts_TX, 0)[..., None] == jnp.arange(num_experts, dtype=experts_TX.dtype)",
        "some experts are elsewhere",
    ),
    Fault(
        "a pair counts itself",
        "plan.py",
        "chosen_PE * (count_PE - 1)",
        "chosen_PE * count_PE",
        "no multiples",
    ),
    Fault(
        "a row goes to its choice instead of its token",
        "plan.py",
        "return self.pair_R // self.row_TX.shape[1]",
        "return self.pair_R % self.row_TX.shape[1]",
        "no multiples",
    ),
    Fault(
        "what goes nowhere has a weight",
        "move.py",
        "jnp.where(plan.row_TX < len(plan.pair_R), weights_TX, 0)",
        "weights_TX",
        "padded",
    ),
    Fault(
        "the gradient of rows has no weight",
        "move.py",
        "plan.token_R, weight_R)",
        "plan.token_R, None)",
        "no multiples",
    ),
    Fault(
        "rows of no token are not 0",
        "backends.py",
        "jnp.zeros((token_R.shape[0], x_TD.shape[1]), x_TD.dtype)",
        "jnp.ones((token_R.shape[0], x_TD.shape[1]), x_TD.dtype)",
        "no token, some rows",
    ),
)

REFERENCE = tuple(
    Fault(what, "reference.py", old, new, case, "reference")
    for what, old, new, case in (
        ("groups are not looked at", "(-choice_TE, ~kept_TE)", "(-choice_TE,)", "groups"),
        ("padding chooses", "jnp.where(counted_T[:, None], experts_TX, E)", "experts_TX", "padded"),
        ("the last row stands for nowhere", "(row_TX < len(y_RD))", "(row_TX < row_TX + 1)", "limited"),
    )
)

XLA = tuple(
    Fault(what, "xla.py", old, new, case)
    for what, old, new, case in (
        ("a group is judged by the better of its two best", "jnp.sum(best, axis=-1)", "best[..., 0]", "groups, top 2"),
        (
            "inf - inf is the best group",
            "jnp.isnan(judged_TG), -jnp.inf",
            "jnp.isnan(judged_TG), jnp.inf",
            "groups of two, special",
        ),
        (
            "experts of other groups are taken for -inf",
            "jnp.argsort(~jnp.repeat(",
            "jnp.argsort(0 * jnp.repeat(",
            "groups",
        ),
        ("padding chooses", "jnp.where(counted_T[:, None], experts_TX, E)", "experts_TX", "padded"),
        ("the last row stands for nowhere", 'mode="fill", fill_value=0', 'mode="clip"', "some experts are elsewhere"),
        (
            "rows are summed in their own type",
            "_rows(y_RD, row_TX[:, x]).astype(jnp.float32)\n        parts",
            "_rows(y_RD, row_TX[:, x]) * 0.99\n        parts",
            "wide",
        ),
    )
)

TPU = tuple(
    Fault(what, file, old, new, case, variant)
    for what, file, old, new, case, variant in (
        (
            "of equal scores the last",
            "tpu_select.py",
            "jnp.min(jnp.where(order == best, at, order.shape[0])",
            "jnp.max(jnp.where(order == best, at, -1)",
            "ties",
            "tpu",
        ),
        (
            "-inf is barred",
            "tpu_select.py",
            "CHOSEN, BARRED = -(2**31), -(2**31) + 1",
            "CHOSEN, BARRED = -(2**31), -(2**31) + 2**25",
            "groups, -inf",
            "tpu",
        ),
        ("negative scores in the wrong order", "tpu_select.py", "& 0x7FFFFFFF)", "& 0)", "no multiples", "tpu"),
        (
            "inf - inf is a number",
            "tpu_select.py",
            "jnp.where(both == both, both, -jnp.inf)",
            "jnp.where(both == both, both, jnp.inf)",
            "groups of two, special",
            "tpu",
        ),
        ("blocks of tokens do not add up", "tpu_select.py", "    count[:] = total\n", "", "several blocks", "tpu"),
        (
            "a token counts itself",
            "tpu_select.py",
            "jnp.where(row < column, 1.0, 0.0)",
            "jnp.where(row <= column, 1.0, 0.0)",
            "no multiples",
            "tpu",
        ),
        (
            "of tokens in front only the last few count",
            "tpu_select.py",
            "total = total + counts[:, LANES:]",
            "total = counts[:, LANES:]",
            "several blocks",
            "tpu",
        ),
        ("padding is counted", "tpu_select.py", "(order == CHOSEN) & counted", "order == CHOSEN", "padded", "tpu"),
        (
            "a sublane that fills a group is an expert",
            "tpu_select.py",
            "first - group * (rows - size)",
            "first",
            "groups",
            "tpu",
        ),
        ("the other row of a word", "tpu_rows.py", "16 * (1 - row_TX % 2)", "16 * (row_TX % 2)", "bfloat16", "tpu"),
        (
            "rows that are nowhere are not masked",
            "tpu_rows.py",
            "jnp.where(masks[x] != 0, words, 0)",
            "words",
            "limited",
            "tpu, simulated",
        ),
        (
            "a copy is not waited for",
            "tpu_rows.py",
            "            pltpu.make_async_copy(some, some, arrived.at[works]).wait()\n",
            "            del some\n",
            "no multiples",
            "tpu, simulated",
        ),
        (
            "two blocks share their room",
            "tpu_rows.py",
            "asks, works, tiles = jax.lax.rem(i, 2), jax.lax.rem(i + 1, 2)",
            "asks, works, tiles = 0, 0",
            "several blocks",
            "tpu, simulated",
        ),
        (
            "rows of a tile have one place",
            "tpu_rows.py",
            "pl.ds(t % ROWS, 1)]",
            "pl.ds(0, 1)]",
            "no multiples",
            "tpu",
        ),
        (
            "weights go to the wrong choice",
            "tpu_rows.py",
            "zip(weights, parts, strict=True)",
            "zip(weights[::-1], parts, strict=True)",
            "no multiples",
            "tpu",
        ),
        (
            "dots without their last lanes",
            "tpu_rows.py",
            "for lanes in lanes_of(dout_ref.shape[1]):",
            "for lanes in [*lanes_of(dout_ref.shape[1])][:1]:",
            "wide",
            "tpu",
        ),
    )
)

FAULTS = SHARED + REFERENCE + XLA + TPU


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.what}")
def test_a_planted_fault_is_caught(fault: Fault, tmp_path: pathlib.Path) -> None:
    with pytest.raises(AssertionError, match=r"Not equal to tolerance|a race"):
        check_variant(CASES[fault.case], fault.variant, tmp_path, (fault.file, fault.old, fault.new))


@pytest.mark.parametrize("variant", ["xla", "tpu", "tpu, simulated"])
def test_without_a_fault_the_same_check_passes(variant: str, tmp_path: pathlib.Path) -> None:
    """What catches a fault is the fault, not the copy."""
    check_variant(CASES["limited"], variant, tmp_path)
