"""Faults planted in the Mosaic GPU kernels of grouped matmul that give a wrong value in a simulation.

Those that are races stand in tests/test_grouped_matmul_gpu.py. ``gpu_simulator.compile_once`` makes them quick.
"""

from __future__ import annotations

from planting import Fault

MATMUL, SWIGLU, INT8 = "matmul, kernel sizes", "swiglu, kernel sizes", "matmul, int8, of a layer, kernel sizes"

GPU_FAULTS = tuple(
    Fault(what, file, old, new, case, "gpu, two blocks")
    for what, file, old, new, case in (
        (
            "a tile overwrites the end of the group before it",
            "gpu_tiles.py",
            "all_rows = (begin <= row) & (row + ROWS <= end)",
            "all_rows = row + ROWS <= end",
            MATMUL,
        ),
        (
            "pieces of a part of the rows overlap",
            "gpu_tiles.py",
            "at = first + (count & -(2 * size))",
            "at = first + (count & -(4 * size))",
            MATMUL,
        ),
        (
            "rows of no group are not written",
            "gpu.py",
            "jnp.append(sizes_E, num_rows - jnp.sum(sizes_E))",
            "jnp.append(sizes_E, 0 * jnp.sum(sizes_E))",
            MATMUL,
        ),
        (
            "a gradient of the weights takes rows of the next group",
            "gpu_outer.py",
            "inside = (row >= begin) & (row < end)",
            "inside = row >= begin",
            MATMUL,
        ),
        (
            "what stands behind the last group is multiplied by 0, though it may be NaN",
            "gpu_outer.py",
            "        pl.when(own)(functools.partial(keep, y_smem.at[:, pl.ds(chunk * CHUNK, CHUNK)]))\n",
            "        del own\n",
            MATMUL,
        ),
        (
            "a thread block goes on where it began",
            "gpu_tiles.py",
            "tile = program + turn * programs",
            "tile = program + 0 * turn * programs",
            MATMUL,
        ),
        (
            "the gradient of silu lacks a term",
            "gpu.py",
            "dh * up * (s + act * (1 - s))",
            "dh * up * s",
            SWIGLU,
        ),
        (
            "each chunk takes what is beside the first",
            "gpu_rows.py",
            "functools.partial(self._ask_for, chunk + 1)",
            "functools.partial(self._ask_for, 0)",
            SWIGLU,
        ),
        (
            "the second term multiplies the first one's rows",
            "gpu_rows.py",
            "(rows_ref.at[pl.ds(row, TILE), depth], x_smem.at[slot])",
            "(rows_refs[0].at[pl.ds(row, TILE), depth], x_smem.at[slot])",
            SWIGLU,
        ),
        (
            "the first layer's matrices",
            "gpu.py",
            "matrix_V = jnp.where(group_V < E, first + group_V, -1)",
            "matrix_V = jnp.where(group_V < E, 0 * first + group_V, -1)",
            INT8,
        ),
        (
            "factors of the first matrix",
            "gpu_int8.py",
            "jnp.maximum(visits_ref[visit, MATRIX_NUMBER], 0)",
            "jnp.minimum(visits_ref[visit, MATRIX_NUMBER], 0)",
            INT8,
        ),
    )
)
