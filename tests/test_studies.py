"""The studies that take hours compare like with like, go on where they stopped, and their summaries are arithmetic."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from benchmarks import kept_bits, router_study
from dsjax.config import load_config
from dsjax.nn.moe import MoEConfig

VARIANTS = sorted(path.stem for path in router_study.CONFIGS.glob("*.py"))


def row(variant: str, seed: int, bits: float, **other: Any) -> dict[str, Any]:
    return {"variant": variant, "seed": seed, "bits_per_byte": bits} | other


def test_models_of_the_bits_study_differ_in_attention_alone() -> None:
    assert len({kept_bits.model_config(variant).num_params() for variant in kept_bits.VARIANTS}) == 1


def test_summary_of_the_bits_study_by_hand() -> None:
    rows = [row("full", 0, 2.0), row("full", 1, 1.0), row("strided", 0, 2.2), row("strided", 1, 1.2)]
    line = kept_bits.summary(rows)["strided"]
    assert line["bits_per_byte"] == pytest.approx(1.7)
    assert line["more_than_full"] == pytest.approx(0.15)
    assert line["interval"] == pytest.approx([0.1, 0.2])
    assert "| strided | 2 | 1.700 | +15.00% (+10.00% to +20.00%) |" in kept_bits.tables(rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_router_differ_in_routing_alone(variant: str) -> None:
    base, config = (load_config(router_study.CONFIGS / f"{name}.py") for name in ("none", variant))
    (ours,), (theirs,) = base.model.groups, config.model.groups
    assert isinstance(theirs.ffn, MoEConfig)
    assert theirs.attention == ours.attention
    assert config.model.num_params() == base.model.num_params()
    assert (config.data, config.train, config.compute) == (base.data, base.train, base.compute)
    assert (config == base) == (variant == "none")


def test_every_comparison_that_is_asked_for_has_its_variants() -> None:
    assert set(router_study.FINALISTS) < set(VARIANTS)
    assert router_study.BASELINE in router_study.FINALISTS


def test_figures_of_a_run_by_hand() -> None:
    def record(step: int, load: float, factor: float) -> dict[str, float]:
        router = {
            "max_over_mean_load": load,
            "drop_rate": 0.1,
            "load_entropy": np.log(2),
            "entropy": 0.0,
            "unaccounted": 0,
        }
        return {"step": step, "loss": 1.0, "capacity/factor": factor} | {
            f"router/group_0/{name}": x for name, x in router.items()
        }

    records = [
        record(2, 9.0, 2.0),
        record(6, 3.0, 2.0),
        record(8, 2.0, 1.25),
        {"step": 8, "held_out_bits_per_byte": 1.5},
    ]
    found = router_study.figures(records, steps=8, num_experts=4)
    assert found["max_over_mean_load"] == pytest.approx(2.5)
    assert found["load_entropy"] == pytest.approx(0.5)
    assert found["bits_per_byte"] == 1.5
    assert found["compiled"] == 2


def test_summary_of_the_router_study_by_hand() -> None:
    other = dict.fromkeys(("max_over_mean_load", "drop_rate", "load_entropy", "token_entropy", "unaccounted"), 0.5)
    other |= {"seconds": 1.0, "compiled": 1}
    bits = {("switch", 0): 2.0, ("switch", 1): 1.0, ("bias", 0): 1.98, ("bias", 1): 0.97, ("none", 0): 1.4}
    rows = router_study.summary([row(*key, value, **other) for key, value in bits.items()])
    assert [r["variant"] for r in rows] == ["none", "bias", "switch"]
    bias = rows[1]
    assert bias["difference"] == pytest.approx(-0.02)
    half = 12.706 * 0.01  # t of one degree of freedom, times the standard error of -0.01 and -0.03
    assert bias["interval"] == pytest.approx((-0.02 - half, -0.02 + half), rel=1e-3)
    assert rows[0]["interval"] is None
    assert "-2.00%" in router_study.tables(rows)


def test_a_finished_run_is_not_made_again(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "bias-3"
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps(row("bias", 3, 1.25)))
    assert router_study.study_one("bias", 3, folder) == row("bias", 3, 1.25)
