"""Faults planted in segmented attention, one at a time: the check of tests/attention_cases.py catches each.

A fault is a snippet of a file, which must stand there exactly once, and what stands there instead. Where the code moves
on, its faults move with it.
"""

from __future__ import annotations

import dataclasses
import pathlib

import pytest
from attention_cases import CASES, check_variant


@dataclasses.dataclass(frozen=True)
class Fault:
    """``old`` of ``file`` becomes ``new``; ``case`` is the case that shows it, computed by ``variant``."""

    what: str
    file: str
    old: str
    new: str
    case: str
    variant: str = "xla"


SHARED = (
    Fault(
        "heads go to the wrong key/value head",
        "far.py",
        "jnp.moveaxis(x_BTNH.reshape(B, T, K, N // K, *x_BTNH.shape[3:]), 2, 1)",
        "jnp.moveaxis(x_BTNH.reshape(B, T, N // K, K, *x_BTNH.shape[3:]), 3, 1)",
        "groups of heads",
        "xla, small",
    ),
    Fault(
        "segments cut the wrong way by a shift",
        "segments.py",
        "return (position + self.shift) // self.size",
        "return (position - self.shift) // self.size",
        "no multiples",
        "reference",
    ),
    Fault(
        "tails one key short",
        "segments.py",
        "% self.size >= self.size - self.window",
        "% self.size > self.size - self.window",
        "no multiples",
        "reference",
    ),
    Fault(
        "the reference sees one position ahead", "reference.py", "(j <= t)", "(j <= t + 1)", "no multiples", "reference"
    ),
    Fault(
        "the default window is a quarter",
        "attend.py",
        "segment_size // 2 if window",
        "segment_size // 4 if window",
        "one more than whole segments",
    ),
    Fault("scores are scaled by 1 / H", "attend.py", "H**-0.5 if scale", "H**-1.0 if scale", "no multiples"),
    Fault(
        "a shift that is ignored",
        "attend.py",
        "operator.index(shift) % max(W, 1), top)",
        "0, top)",
        "no multiples",
    ),
    Fault(
        "padding is not zeroed",
        "attend.py",
        "        out_BTNU = jnp.where((ids_BT > 0)[:, :, None, None], out_BTNU, 0)\n",
        "        pass\n",
        "a row of padding",
    ),
    Fault(
        "padding has a gradient",
        "attend.py",
        "        dout_BTNU = jnp.where((ids_BT > 0)[:, :, None, None], dout_BTNU, 0)\n",
        "        pass\n",
        "a row of padding",
    ),
    Fault(
        "documents are forgotten on the way back",
        "attend.py",
        "v_BTKU, ids_BT, out_BTNU, log_BTN, dout_BTNU)\n",
        "v_BTKU, None, out_BTNU, log_BTN, dout_BTNU)\n",
        "packed",
    ),
)

CHOSEN = (
    Fault(
        "one segment too few counts as all",
        "attend.py",
        "segments.top + 2 >= segments.count(length) - 1",
        "segments.top + 3 >= segments.count(length) - 1",
        "top 1 of four",
    ),
    Fault(
        "tails are seen twice",
        "attend.py",
        "segments if segments.top is None else dataclasses.replace(segments, window=0, top=None)",
        "segments if segments.top is None else dataclasses.replace(segments, top=None)",
        "top 1 of four",
    ),
    Fault(
        "parts are merged by their largest sum",
        "far.py",
        "both = jnp.logaddexp(log, more_log)",
        "both = jnp.maximum(log, more_log)",
        "top 1 of four",
    ),
    Fault(
        "parts are merged to base 2",
        "far.py",
        "both = jnp.logaddexp(log, more_log)",
        "both = jnp.logaddexp2(log, more_log)",
        "top 1 of four",
    ),
    Fault(
        "what was not chosen is merged",
        "far.py",
        "jnp.where((row_BKt >= 0)[..., None], more_log, -jnp.inf)",
        "more_log",
        "top 1 of four",
    ),
    Fault(
        "only the last choice has a gradient",
        "far.py",
        "return dq_BKtGH + _take(dq_BKRGH",
        "return _take(dq_BKRGH",
        "top 1 of four",
    ),
    Fault(
        "keys have no gradient from where they were chosen",
        "attend.py",
        "dtails = Tails(dk.astype",
        "dtails = Tails(0 * dk.astype",
        "top 1 of four",
    ),
    Fault(
        "the output's part of the gradient is left out of chosen tails",
        "attend.py",
        "chosen_gradients(run, q_BTNH, ids_BT, tails, segments, log_BTN, along_BTN, dout_BTNU)",
        "chosen_gradients(run, q_BTNH, ids_BT, tails, segments, log_BTN, 0 * along_BTN, dout_BTNU)",
        "top 1 of four",
    ),
    Fault(
        "the heads of segments are taken for their tails",
        "selection.py",
        "[:, :, segments.size - segments.window :]",
        "[:, :, : segments.window]",
        "top 1 of four",
    ),
    Fault(
        "the own segment is chosen, with its future",
        "selection.py",
        "there_BTJ &= j < own_BT[..., None]",
        "there_BTJ &= j <= own_BT[..., None]",
        "top 1 of four",
    ),
    Fault(
        "the first segment of the row, not of the document",
        "selection.py",
        "(jnp.cumsum(there_BTJ, axis=-1) == 1)",
        "(j == 0)",
        "top 0, packed",
    ),
    Fault(
        "the first head of a group chooses", "selection.py", "astype(jnp.float32).mean(axis=3)",
        "astype(jnp.float32)[:, :, :, 0]", "top 2",
    ),
    Fault("the worst are chosen", "selection.py", "jax.lax.top_k(scores_BTKJ, width)",
        "jax.lax.top_k(jnp.where(jnp.isfinite(scores_BTKJ), -scores_BTKJ, scores_BTKJ), width)", "top 2"),
    Fault(
        "blocks of rows overlap",
        "selection.py",
        "(ends_J - blocks_J) * block, num_rows)",
        "ends_J * 0, num_rows)",
        "top 1 of four",
    ),
)  # fmt: skip

XLA = tuple(
    Fault(what, "xla.py", old, new, case, "xla, small")
    for what, old, new, case in (
        (
            "a query sees the next position",
            "(_block(self.first, key) <= t)",
            "(_block(self.first, key) <= t + 1)",
            "no multiples",
        ),
        (
            "all of a segment is seen by later ones",
            "(t <= _block(self.last, key))",
            "(t >= 0)",
            "no multiples",
        ),
        (
            "the first position of a tail is cut off",
            "next_segment - segments.window + slot % segments.window >= 0",
            "next_segment - segments.window + slot % segments.window > 0",
            "many segments",
        ),
        (
            "blocks that few queries see are left out",
            "(last >= np.maximum(first, start))",
            "(last >= np.maximum(first, start) + 16)",
            "no multiples",
        ),
        (
            "sums are not scaled to a new maximum",
            "out_RU * kept_R[:, None] + more_RU",
            "out_RU + more_RU",
            "many segments",
        ),
        (
            "the logarithm is to base 2",
            "(top + jnp.log2(total)) / LOG2_E",
            "(top + jnp.log2(total))",
            "no multiples",
        ),
        (
            "documents are ignored",
            "sees &= _block(self.ids[0], query)[:, None] == _block(self.ids[1], key)",
            "pass",
            "packed",
        ),
        (
            "the gradient is not masked",
            "scores_SR = jnp.where(visits.sees(query, key).T, scores_SR, MASKED)",
            "pass",
            "no multiples",
        ),
        (
            "blocks of several documents are skipped",
            "(q_low[query_P] <= k_high[key_P])",
            "(q_low[query_P] >= k_high[key_P])",
            "packed, long segments",
        ),
        (
            "keys have no gradient from their tails",
            "return jax.linear_transpose(self.of_keys, like)(x_JS)[0]",
            "return x_JS[: self.plan.num_own].reshape(-1, *x_JS.shape[2:])[: like.shape[0]]",
            "many segments",
        ),
        (
            "the scale is left out of a gradient",
            "dq.swapaxes(1, 2) * scale",
            "dq.swapaxes(1, 2)",
            "no multiples",
        ),
        (
            "the output's part of the gradient is left out",
            "(p_SR * (dp_SR - _block(along_QR, query)))",
            "(p_SR * dp_SR)",
            "no multiples",
        ),
    )
)

TPU = (
    Fault(
        "sums are not scaled to a new maximum",
        "tpu_forward.py",
        "[ref[rows] * across(shrink, ref.shape[1]) for ref in sum_refs]",
        "[ref[rows] for ref in sum_refs]",
        "many segments",
        "tpu, small",
    ),
    Fault(
        "the last chunk of tails is not masked",
        "tpu_forward.py",
        "jax.lax.broadcasted_iota(jnp.int32, (1, part), 1) + j * part < count",
        "jax.lax.broadcasted_iota(jnp.int32, (1, part), 1) >= 0",
        "no multiples",
        "tpu, small",
    ),
    Fault(
        "a block sees the tails of its own segments",
        "tpu_layout.py",
        "np.maximum(segment * self.segments.window - self.absent, 0)",
        "np.maximum((segment + 1) * self.segments.window - self.absent, 0)",
        "long segments",
        "tpu, small",
    ),
    Fault(
        "heads look at the wrong key/value head",
        "tpu_forward.py",
        "batch, kv_head = jax.lax.div(head, N), jax.lax.div(head, N // K)",
        "batch, kv_head = jax.lax.div(head, N), jax.lax.rem(head, K)",
        "groups of heads",
        "tpu, small",
    ),
    Fault(
        "a copy is not waited for",
        "tpu_stream.py",
        "            copy.wait()\n",
        "            pass\n",
        "no multiples",
        "tpu, simulated",
    ),
    Fault(
        "two chunks share a buffer",
        "tpu_stream.py",
        "slot, some = jax.lax.rem(c, 2), list[Any]()",
        "slot, some = 0, list[Any]()",
        "many segments",
        "tpu, simulated",
    ),
    Fault(
        "the queries' gradient is read before it has come",
        "tpu_backward.py",
        "        begun.wait()\n",
        "",
        "no multiples",
        "tpu, simulated",
    ),
    Fault(
        "a sum begins with what was in memory",
        "tpu_backward.py",
        "        dq_scratch[:] = jnp.zeros_like(dq_scratch)\n        sources",
        "        sources",
        "no multiples",
        "tpu, simulated",
    ),
    Fault(
        "tails that nobody chose keep what was in memory",
        "tpu_rows.py",
        "jnp.where(seen, x, 0)",
        "x",
        "top 1 of four",
        "tpu, simulated",
    ),
)

FAULTS = SHARED + CHOSEN + XLA + TPU


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.what}")
def test_a_planted_fault_is_caught(fault: Fault, tmp_path: pathlib.Path) -> None:
    with pytest.raises(AssertionError, match=r"Not equal to tolerance|a race"):
        check_variant(CASES[fault.case], fault.variant, tmp_path, (fault.file, fault.old, fault.new))


@pytest.mark.parametrize("variant", ["reference", "xla", "xla, small", "tpu, small", "tpu, simulated"])
def test_without_a_fault_the_same_check_passes(variant: str, tmp_path: pathlib.Path) -> None:
    """What catches a fault is the fault, not the copy."""
    check_variant(CASES["top 1 of four"], variant, tmp_path)
