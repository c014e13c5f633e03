"""What ``dsjax kernels grouped_matmul`` compiles, compares and keeps; the command is in test_kernels_command.py."""

from __future__ import annotations

import dataclasses
import pathlib
import runpy
import shutil
from typing import Any

import jax
import pytest

from dsjax.plan import kernels_grouped_matmul as kernels
from dsjax.plan.kernels import Case, module_of

ROOT = pathlib.Path(__file__).parent.parent


def result(case: Case, cycles: int) -> dict[str, Any]:
    """What the compiler's process would write."""
    return {
        "case": {**dataclasses.asdict(case), "tiles": [list(tile) for tile in case.tiles]},
        "device_kind": "TPU v5 lite",
        "cycles": cycles,
        "kernel_hbm_bytes": 10**8,
        "outside_hbm_bytes": 10**7,
        "outside_cycles_by_compiler": 1000,
        "temporary_bytes": 2**20,
        "prepare_seconds": 1.5,
        "compile_seconds": 2.5,
    }


def cycles_of(case: Case) -> int:
    """Megablox needs a tenth more for each step away from 256 rows, and more where groups are skewed."""
    if case.implementation == "megablox":
        rows = dict(case.tiles)["rows"]
        return (1_000_000 if rows == 256 else 1_100_000) * (2 if case.variant == "skewed" else 1)
    return {"ours": 600_000, "layer": 1_800_000, "dispatch": 199_000}[case.implementation] * (3 if case.backward else 1)


def test_both_distributions_have_all_rows_and_the_skewed_one_half_of_them_in_one_group() -> None:
    assert module_of("grouped_matmul") is kernels
    for sizes in kernels.SIZES.values():
        assert (len(sizes), sum(sizes)) == (kernels.EXPERTS, kernels.ROWS)
    skewed = kernels.SIZES["skewed"]
    assert max(skewed) >= kernels.ROWS // 2
    assert all(size % 16 for size in skewed if size != 272)


def test_the_floor_is_the_arithmetic_at_the_peak_of_the_units() -> None:
    """By hand: 8,192 rows times 16 x 16 blocks of 128 x 128 over 4 units; on v6e 8 x 8 blocks of 256 x 256."""
    assert kernels.mxu_floor("v5e", 1) == 8192 * 16 * 16 / 4
    assert kernels.mxu_floor("v6e", 1) == 8192 * 8 * 8 / 4
    assert kernels.mxu_floor("v6e", 9) == 9 * 8192 * 8 * 8 / 4


def test_the_report_compares_with_the_best_of_megablox() -> None:
    found = kernels.summary("v5e", [result(case, cycles_of(case)) for case in kernels.cases("v5e")])
    assert found["ratio_to_peer"] == {"forward_balanced": 0.6, "forward_skewed": 0.3}
    assert found["ratio_to_mxu_floor"]["forward_balanced"] == 600_000 / 524_288
    assert found["ratio_to_mxu_floor"]["layer_forward_backward_skewed"] == 5_400_000 / (9 * 524_288)
    rows = {row["measured"]: row for row in found["rows"]}
    assert rows["forward_skewed"]["peer"]["passes"]["gmm"]["tiles"] == "rows 256, contracted 2048, columns 1024"
    # 110 MB at 819 GB/s and 1.503 GHz
    assert rows["forward_balanced"]["hbm_cycles"] == pytest.approx(1.1e8 / 819e9 * 1.503e9, rel=1e-3)
    assert found["dispatch_and_combine"] == {"cycles": 200_000, "share_of_layer_forward": 0.1}


def test_the_search_keeps_the_best_of_each_kernel_and_leaves_other_chips(tmp_path: pathlib.Path) -> None:
    table = tmp_path / "tile_table.py"
    shutil.copy(ROOT / kernels.TABLE, table)
    before = runpy.run_path(str(table))["TABLE"]
    cases = kernels.search("v5e")
    kernels.write_table(
        table, [result(case, 5000 - dict(case.tiles)["inner"] - dict(case.tiles)["step"]) for case in cases]
    )
    after = runpy.run_path(str(table))["TABLE"]
    own = {key[1]: after.pop(key) for key in list(after) if key[0] == "TPU v5 lite"}
    assert own == dict.fromkeys(kernels.CALLS, (512, 128, 64, 2048, 2048)) | {"outer": (512, 128, 64, 1024, 1024)}
    assert after == {key: tiles for key, tiles in before.items() if key[0] != "TPU v5 lite"}


@pytest.mark.parametrize("implementation", ["ours", "layer", "dispatch"])
def test_what_is_compiled_can_be_traced(implementation: str) -> None:
    case = Case(kernels.NAME, implementation, "v5e", kernels.ROWS, implementation == "layer", variant="skewed")
    program = kernels.build(case)
    assert jax.tree.leaves(jax.eval_shape(program.function, *program.arguments))
