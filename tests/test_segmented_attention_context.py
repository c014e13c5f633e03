"""A row cut over eight devices gives what one device gives; what travels is tails."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.segmented_attention import Segments, context_parallel_attention, segmented_attention_reference

B, T, N, K, H, U = 2, 128, 4, 2, 8, 6
SPEC = PartitionSpec(None, "context")


def inputs(documents: str) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(B, T, n, h)), jnp.float32) for n, h in ((N, H), (K, H), (K, U))]
    ids = np.ones((B, T), np.int32)
    if documents == "coming back":
        ids[:, 7::16], ids[1, 9:40] = 0, 2  # the ends of tails are padding
    if documents == "several":
        ids = np.cumsum(rng.random((B, T)) < 0.05, axis=1) + 1
        ids[0, -37:], ids[1, :11] = 0, 0  # padding over whole devices
    return arrays, jnp.asarray(ids, jnp.int32), jnp.asarray(rng.normal(size=(B, T, N, U)), jnp.float32)


def across(segments: Segments, num_devices: int = 8):
    """The function over whole rows that cuts them over devices."""
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("context",))

    def local(q, k, v, ids):
        return context_parallel_attention(q, k, v, axis="context", segments=segments, documents=ids, scale=0.3)

    return jax.shard_map(local, mesh=mesh, in_specs=(SPEC,) * 4, out_specs=SPEC, check_vma=False)


@pytest.mark.parametrize("documents", ["one", "several"])
@pytest.mark.parametrize(
    ("segments", "num_devices"),
    [
        (Segments(16, 8), 8),
        (Segments(16, 8, 8), 8),
        (Segments(8, 2, 5), 4),
        (Segments(4, 4, 3), 2),
        (Segments(16, 0, 8), 8),
        (Segments(4, 2, 2, top=3), 8),
        (Segments(8, 3, top=0), 4),
    ],
    ids=str,
)
def test_eight_devices_equal_one(segments: Segments, num_devices: int, documents: str) -> None:
    arrays, ids, dout = inputs(documents)

    def both(f):
        out, vjp = jax.vjp(lambda *x: f(*x, ids), *arrays)
        return out, *vjp(dout)

    reference = functools.partial(segmented_attention_reference, segments=segments, scale=0.3)
    got = jax.jit(lambda: both(across(segments, num_devices)))()
    want = jax.jit(lambda: both(lambda q, k, v, ids: reference(q, k, v, ids)))()
    # float32 sums of up to 128 terms near 1, in another order
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=2e-5)


def test_where_top_segments_are_all_they_are_seen_whatever_the_documents() -> None:
    arrays, ids, _ = inputs("coming back")
    got = jax.jit(across(Segments(16, 8, 8, top=6), 2))(*arrays, ids)
    want = segmented_attention_reference(*arrays, ids, Segments(16, 8, 8), scale=0.3)
    np.testing.assert_allclose(got, want, atol=2e-5)  # as above


@pytest.mark.parametrize(("window", "shift"), [(8, 0), (8, 8), (4, 4)])
def test_what_travels_is_tails(window: int, shift: int) -> None:
    """Of the keys and values that ring attention sends, w / W, and the start of one segment."""
    arrays, ids, _ = inputs("one")
    compiled = jax.jit(across(Segments(16, window, shift))).lower(*arrays, ids).compile()
    sent = {"all-gather": 0, "collective-permute": 0}
    for line in compiled.as_text().splitlines():
        for name in sent:
            if f" {name}(" in line or f" {name}-start(" in line:
                for shape in _shapes(line.split(" = ")[1].split(f" {name}")[0]):
                    sent[name] += int(np.prod(shape))
        assert " all-to-all(" not in line
        assert " all-reduce(" not in line
    row, per_position = B * T, K * (H + U) + 1  # keys, values, ids
    assert sent["all-gather"] == row * window // 16 * per_position
    assert sent["collective-permute"] == B * shift * per_position


def _shapes(text: str) -> list[tuple[int, ...]]:
    import re

    return [tuple(map(int, dims.split(","))) for dims in re.findall(r"[fs]32\[([0-9,]+)\]", text)]


def test_a_part_of_a_segment_is_refused() -> None:
    arrays, ids, _ = inputs("one")
    with pytest.raises(ValueError, match=r"a device has 16 positions; segment_size, 12, must divide them"):
        across(Segments(12, 6))(*arrays, ids)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"implementation": "reference"}, "implementation is 'reference'; it is None, 'xla', 'tpu' or 'gpu'"),
        ({"implementation": "cuda"}, "implementation is 'cuda'; it is None, 'xla', 'tpu' or 'gpu'"),
        ({"q_BtNH": jnp.ones((B, 16, 1, H))}, "q has 1 heads, k and v 2"),
        ({"documents": [[1] * 16] * B}, "documents is a list; it must be an array"),
    ],
    ids=["reference", "cuda", "heads", "documents"],
)
def test_mistakes_are_said_as_by_the_call_over_whole_rows(changes: dict, said: str) -> None:
    q, k, v = (x[:, :16] for x in inputs("one")[0])
    # Without the run-time types of the tests, which would refuse an unknown implementation in their own words.
    plain = getattr(context_parallel_attention, "__wrapped__", context_parallel_attention)
    with pytest.raises(ValueError, match=said):
        plain(**{"q_BtNH": q, "k_BtKH": k, "v_BtKU": v, "axis": "context", "segments": Segments(8, 4), **changes})
