"""Faults of the TPU kernels of grouped matmul, and the variant that shows them: small pieces.

Their cases have groups that begin and end within a block of rows, that share one, that have several pieces, or no row.
"""

from __future__ import annotations

from grouped_matmul_cases import CASES, VARIANTS, Case
from planting import Fault, simulated

# Pieces of 32 rows, of which 16 may be worked on alone; two blocks of columns of the wider results.
SMALL_TILES = ("tiles.py", "ANYWHERE = Tiles(512, 128, 128, 2048, 256)", "ANYWHERE = Tiles(32, 16, 16, 128, 128)")
VARIANTS["tpu, small"] = ("tpu", (SMALL_TILES,))
VARIANTS["tpu, small, simulated"] = ("tpu", (SMALL_TILES, *simulated("multiply.py")))

SIZES = (5, 0, 70, 3, 2, 40)
CASES |= {
    "tpu: two blocks of columns": Case(SIZES, spare=30, function="matmul", D=24, F=256, layers=3),
    "tpu: int8": Case(SIZES, spare=2, function="matmul", D=256, F=24, int8=True, layers=3),
    "tpu: experts": Case(SIZES, spare=20, function="experts", tokens=80, D=128, F=40),
    "tpu: experts, bfloat16": Case(SIZES, spare=20, function="experts", tokens=80, D=256, F=128, dtype="bfloat16"),
    "tpu: few rows": Case((5, 0, 38, 3), spare=9, function="matmul", D=8, F=12),
}

TPU_FAULTS = tuple(
    Fault(what, file, old, new, case, variant)
    for what, file, old, new, case, variant in (
        (
            "a group's first rows overwrite those of the group before",
            "tpu_rows.py",
            "pl.when(piece.opens & (piece.row < piece.start))",
            "pl.when(piece.opens & (piece.row > piece.start))",
            "tpu: few rows",
            "tpu, small",
        ),
        (
            "rows behind the last group in its block are not 0",
            "tpu_rows.py",
            "choose(row + piece.row + last < piece.end, out[pl.ds(last, BLOCK)], 0.0)",
            "out[pl.ds(last, BLOCK)]",
            "tpu: few rows",
            "tpu, small",
        ),
        (
            "blocks behind the last group are not written",
            "tpu.py",
            'MATMUL = Call("matmul", _same, zero=True)',
            'MATMUL = Call("matmul", _same)',
            "tpu: two blocks of columns",
            "tpu, small, simulated",
        ),
        (
            "all groups have the first one's matrix",
            "tpu_visits.py",
            '"matrix": group_P + first,',
            '"matrix": 0 * group_P + first,',
            "tpu: few rows",
            "tpu, small",
        ),
        (
            "the layer is forgotten",
            "tpu_visits.py",
            '"matrix": group_P + first,',
            '"matrix": group_P,',
            "tpu: two blocks of columns",
            "tpu, small",
        ),
        (
            "a piece of a long group is left out",
            "tpu_visits.py",
            "- lows_E + rows - 1) // rows, 0)",
            "- lows_E + rows - 1 - BLOCK) // rows, 0)",
            "tpu: few rows",
            "tpu, small",
        ),
        (
            "scales of another block of columns",
            "tpu_rows.py",
            "parts += [s.at[piece.matrix, :, columns] for s in scales]",
            "parts += [s.at[0, :, columns] for s in scales]",
            "tpu: int8",
            "tpu, small",
        ),
        (
            "an int8 matrix is that of the group before",
            "tpu_rows.py",
            "_cast(buffer.at[piece.group_slot], cast)",
            "_cast(buffer.at[1 - piece.group_slot], cast)",
            "tpu: int8",
            "tpu, small",
        ),
        (
            "rows of other groups are in a gradient",
            "tpu_outer.py",
            "pl.when(piece.row < piece.start)(lambda: keep(0, row >= piece.start))",
            "pass",
            "tpu: few rows",
            "tpu, small",
        ),
        (
            "rows behind a group are in its gradient",
            "tpu_outer.py",
            "keep(offset, row + offset < piece.end)",
            "pass",
            "tpu: few rows",
            "tpu, small",
        ),
        (
            "a gradient begins with the last group's",
            "tpu_outer.py",
            "jnp.where(piece.opens, 0, total[rows])",
            "total[rows]",
            "tpu: few rows",
            "tpu, small, simulated",
        ),
        (
            "groups without rows keep what was in memory",
            "tpu_outer.py",
            '@pl.when(lists["num_empty"][0] > 0)',
            '@pl.when(lists["num_empty"][0] < 0)',
            "tpu: few rows",
            "tpu, small, simulated",
        ),
        (
            "a gathered row is the one before",
            "tpu_rows.py",
            "self.tokens[piece.row + i * BLOCK + r], eights",
            "self.tokens[jnp.maximum(piece.row + i * BLOCK + r - 1, 0)], eights",
            "tpu: experts",
            "tpu, small",
        ),
        (
            "halves of gathered rows are exchanged",
            "tpu_rows.py",
            "enumerate((words << 16, words & -(2**16)))",
            "enumerate((words & -(2**16), words << 16))",
            "tpu: experts, bfloat16",
            "tpu, small",
        ),
        (
            "rows are worked on before they have come",
            "tpu_rows.py",
            "        rows.wait(piece)\n",
            "",
            "tpu: few rows",
            "tpu, small, simulated",
        ),
        (
            "a piece that is written is not waited for",
            "tpu_rows.py",
            "        pl.when(p > 0)(lambda: outs.wait(Piece.of(lists, p - 1)))\n",
            "",
            "tpu: few rows",
            "tpu, small, simulated",
        ),
        (
            "the gate's gradient forgets the gate",
            "tpu.py",
            "dh * up * (s + act * (1 - s))",
            "dh * up * s",
            "tpu: experts",
            "tpu, small",
        ),
    )
)
