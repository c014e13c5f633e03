"""What is special to the TPU kernels of grouped matmul: pieces of rows, tiles, what they can not do; that they are
right is shown with the cases of all implementations, and at sizes where every path of theirs is taken."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_matmul_cases import CASES, check_variant
from grouped_matmul_tpu_faults import TPU_FAULTS  # with its variants
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import tiles, tpu
from pallas_kernels.grouped_matmul.tiles import Tiles, tiles_for
from pallas_kernels.grouped_matmul.tpu_visits import BLOCK, pieces_of

assert TPU_FAULTS
DEFAULT = {
    "matmul, no row in any group",
    "matmul of a layer",
    "swiglu, bfloat16",
    "tpu: two blocks of columns",
    "tpu: int8",
    "tpu: experts",
    "tpu: experts, bfloat16",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in DEFAULT else pytest.mark.slow) for name in CASES]
)
def test_it_is_the_definition(name: str, tmp_path: pathlib.Path) -> None:
    check_variant(CASES[name], "tpu, small", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_with_the_tiles_of_a_chip_it_is_the_definition(name: str, tmp_path: pathlib.Path) -> None:
    check_variant(CASES[name], "tpu", tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "tpu: few rows",
        pytest.param("tpu: two blocks of columns", marks=pytest.mark.slow),
        pytest.param("tpu: experts, bfloat16", marks=pytest.mark.slow),
        pytest.param("swiglu", marks=pytest.mark.slow),
        pytest.param("matmul, int8", marks=pytest.mark.slow),
    ],
)
def test_simulated_it_has_no_races_and_reads_nothing_that_was_not_written(name: str, tmp_path: pathlib.Path) -> None:
    check_variant(CASES[name], "tpu, small, simulated", tmp_path)


# ---------------------------------------------------------------- pieces


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=9),
    st.integers(0, 50),
    st.sampled_from([16, 32, 64]),
    st.booleans(),
)
def test_pieces_cover_each_groups_rows_once_and_little_more(
    sizes: list[int], spare: int, rows: int, even: bool
) -> None:
    R = -(-(sum(sizes) + spare) // BLOCK) * BLOCK
    lists = pieces_of(jnp.asarray(sizes, jnp.int32), 7, R, rows, even=even)
    found = {name: np.asarray(x) for name, x in lists.items()}
    num, ends = found["num"][0], np.cumsum(sizes)
    assert num <= len(found["row"])  # all have room
    assert found["behind"][0] == -(-sum(sizes) // BLOCK) * BLOCK
    covered = np.zeros((len(sizes), R + rows), int)
    turns = {}
    for p in range(num):
        row, count, e = found["row"][p], found["count"][p], found["matrix"][p] - 7
        assert row % BLOCK == count % BLOCK == 0
        assert 0 < count <= rows
        assert row + count <= R
        assert (found["start"][p], found["end"][p]) == (ends[e] - sizes[e], ends[e])
        covered[e, row : row + count] += 1
        turns.setdefault(e, found["turn"][p])
        assert found["turn"][p] == turns[e]
        own = found["count"][:num][found["matrix"][:num] == e + 7]
        full = own[:-2] if even else own[:-1]
        assert (full == rows).all()
        assert not even or len(own) < 2 or 0 <= own[-2] - own[-1] <= BLOCK
        later = [q for q in range(num) if found["matrix"][q] > found["matrix"][p]]
        assert found["following"][p] == (later[0] if later else num)
    assert sorted(turns.values()) == list(range(sum(size > 0 for size in sizes)))
    for e, size in enumerate(sizes):
        own = np.zeros(R + rows, bool)
        own[ends[e] - size : ends[e]] = True
        assert (covered[e][own] == 1).all()
        assert covered[e].sum() <= size + 2 * (BLOCK - 1)
        assert size or not covered[e].any()


# ---------------------------------------------------------------- tiles


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.booleans(), st.integers(1, 200))
def test_tiles_fit_the_width_and_the_room(lanes: int, odd: bool, bytes_of_a_number: int) -> None:
    width = lanes * 128 + (odd and 40)

    def room(t: Tiles) -> int:
        return (t.rows * 4096 + 4096 * t.columns + t.rows * t.columns) * bytes_of_a_number

    found = tiles_for("matmul", 2, width, room)
    least = Tiles(16, 16, 64, width if odd else 128, width if odd else 128)
    if found is None:
        assert room(least) > tiles.memory() * 3 // 4
        return
    assert room(found) <= tiles.memory() * 3 // 4
    assert width % found.columns == found.columns % found.inner == 0
    assert found.sizes[-1] == found.rows
    assert list(found.sizes) == sorted(set(found.sizes))
    for n in (found.columns, found.inner):
        assert n % 128 == 0 or n == width


def test_sizes_of_products() -> None:
    assert Tiles(512, 128, 32, 0, 0).sizes == (128, 160, 192, 224, 256, 288, 320, 384, 448, 512)
    assert Tiles(512, 64, 64, 0, 0).within(48).sizes == (32,)


# ---------------------------------------------------------------- what it can not do


def test_reasons() -> None:
    def shape(*dims: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype)

    def why(x, w, transposed=False) -> str | None:
        return tpu.why_not("matmul", x, w, None, shape(4, dtype="int32"), 0, transposed=transposed)

    assert why(shape(64, 2048), shape(4, 2048, 1408)) is None
    assert why(shape(64, 2048), shape(4, 2048, 512, dtype="int8")) is None
    assert why(shape(64, 7168, dtype="float32"), shape(4, 2048, 7168, dtype="float32"), True) is None
    assert "float16" in str(why(shape(64, 64, dtype="float16"), shape(4, 64, 64, dtype="float16")))
    assert "all bfloat16 or all float32" in str(why(shape(64, 64), shape(4, 64, 64, dtype="float32")))
    assert "rows of 100000 numbers do not fit" in str(why(shape(64, 100000), shape(4, 100000, 128)))
    w, x = shape(4, 2048, 2048), shape(64, 2048)
    assert tpu.why_not("swiglu", x, None, w, w, w, shape(4, dtype="int32"), 0, keep=True) is None
    assert tpu.why_not("swiglu_backward", x, None, w, w, w, shape(4, dtype="int32"), 0, (x, x), x) is None
    assert tpu.why_not("outer", x, x, shape(4, dtype="int32")) is None
