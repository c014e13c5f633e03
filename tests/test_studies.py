"""The studies that take hours compare like with like, go on where they stopped, and their summaries are arithmetic."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from models import DENSE, V, graph, logits, random_tokens, weights

from benchmarks import kept_bits, line_completion, router_study, sparse_dense
from dsjax.config import load_config
from dsjax.data.prepare import HeldOut
from dsjax.evals.bits import document_bits
from dsjax.infer.engine import complete
from dsjax.infer.sampling import SamplingConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.plan.flops import count_flops
from dsjax.plan.programs import make_program

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


# ---------------------------------------------------------------- sparse against dense


def test_mixture_and_dense_models_differ_in_feed_forward_alone_and_match_in_parameters() -> None:
    configs = {variant: sparse_dense.config_of(variant) for variant in sparse_dense.VARIANTS}
    total, active = sparse_dense.own_params(configs["mixture"].model)
    assert total == pytest.approx(5 * active, rel=1e-3)
    for variant, want in (("dense_total", total), ("dense_active", active)):
        config = configs[variant]
        # its width is a multiple of 8: 4 * 3 * 256 parameters in each of 3 layers at the most, of 2.2 M
        assert sparse_dense.own_params(config.model) == (pytest.approx(want, rel=4e-3),) * 2
        (ours,), (theirs,) = configs["mixture"].model.groups, config.model.groups
        assert isinstance(theirs.ffn, MLPConfig)
        same = dataclasses.replace(config.model, groups=(dataclasses.replace(theirs, ffn=ours.ffn),))
        assert dataclasses.replace(config, model=same) == configs["mixture"]


END, PARAMS = 31, weights(DENSE)  # of the small model


def held_out(*ids: np.ndarray) -> list[HeldOut]:
    return [HeldOut(str(number), "x" * len(row), row.astype(np.int32)) for number, row in enumerate(ids)]


def test_reading_gives_the_bits_of_the_evaluation() -> None:
    """Documents longer and shorter than a window, and an empty one."""
    documents = held_out(*(random_tokens(1, size, seed=size)[0] for size in (40, 9, 16, 0, 17)))
    found = line_completion.read(graph(DENSE), PARAMS, documents, seq_len=16, end_id=END, batch_size=3)
    want = document_bits(graph(DENSE), PARAMS, documents, seq_len=16, end_id=END, batch_size=2)
    # float32 logits in batches of another size
    np.testing.assert_allclose([r.nats_T.sum() / np.log(2) for r in found], want, rtol=1e-5)
    assert [r.targets_T.tolist() for r in found] == [[*d.ids.tolist(), END] for d in documents]
    best = logits(DENSE, PARAMS, np.array([[END, *documents[1].ids]])).argmax(-1)[0]
    assert found[1].best_T.tolist() == best.tolist()


def test_a_line_is_completed_if_greedy_decoding_writes_it() -> None:
    """Rows that the model itself wrote, half of them with a token changed here and there."""
    greedy: dict[str, Any] = {"end_id": V, "max_length": 128, "sampling": SamplingConfig(temperature=0.0)}
    prompts = [[END, *row] for row in random_tokens(12, 4, ids=30).tolist()]
    written = np.array(complete(graph(DENSE), PARAMS, prompts, max_tokens=48, **greedy))
    rng, newline = np.random.default_rng(0), np.bincount(written.ravel()).argmax()
    changed = (rng.random(written.shape) < 0.1) & (np.arange(len(written))[:, None] % 2 == 0)
    rows = np.where(changed, rng.integers(0, 30, written.shape), written)
    ends = ["" if token == newline else None for token in range(V)]

    found = line_completion.read(graph(DENSE), PARAMS, held_out(*rows), seq_len=64, end_id=END)
    hits = np.concatenate([line_completion.lines_completed(document, ends) for document in found])
    middles, rests = [], []
    for row in rows.tolist():
        begin = 0
        for end in np.flatnonzero(np.array(row) == newline) + 1:
            if end - begin >= line_completion.LEAST_TOKENS:
                middle = begin + (end - begin) // 2
                middles.append([END, *row[:middle]])
                rests.append(row[middle:end])
            begin = end
    longest = max(map(len, rests))
    completed = complete(graph(DENSE), PARAMS, middles, max_tokens=longest, **greedy)
    assert hits.tolist() == [got[: len(rest)] == rest for got, rest in zip(completed, rests, strict=True)]
    assert 0 < hits.sum() < len(hits)


def test_lines_by_hand() -> None:
    ends = [None, None, None, "", "):"]  # of the ids 0 to 4: two of them end a line, one with text of its own
    targets = np.array([0, 1, 2, 3] + [0, 1, 3] + [0, 1, 2, 0, 4] + [0, 1, 0, 2, 4] + [1, 1, 2, 4] + [2, 2, 2])
    best = targets.copy()
    best[[0, 1]] = 2  # in the given half of the first line
    best[9] = 0  # in the rest of the third
    best[16] = 3  # the fourth line ends, but without its text
    found = line_completion.lines_completed(line_completion.Read(np.zeros(24), best, targets), ends)
    assert found.tolist() == [1, 0, 0, 1]  # a line of three tokens and one without an end are not asked


def costs_of(seconds: float, joules: float) -> dict[str, Any]:
    rounds = [seconds * x for x in (1.0, 1.1, 0.9, 1.0, 1.05, 1.0)]
    return {"flops": 1e6 * seconds, "seconds": rounds, "compiled_joules": joules, "least_joules": joules**2}


def study_by_hand(seeds: int = 3) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The dense model of equal total takes 5 times the seconds and 4 times the energy, and is 1 % more accurate."""
    costs = {"mixture": costs_of(1, 1e-6), "dense_total": costs_of(5, 4e-6), "dense_active": costs_of(1, 1e-6)}
    scores = {"mixture": (0.495, 0.18), "dense_total": (0.5, 0.2), "dense_active": (0.48, 0.19)}
    runs = [
        row(variant, seed, 2.0, steps=7, tokens=9, num_tokens=10, num_lines=4, seconds=1.0)
        | {"next_token": next_token + 0.01 * seed, "exact_line": line}
        for seed in range(seeds)
        for variant, (next_token, line) in scores.items()
    ]
    return runs, dict.fromkeys(sparse_dense.WORKS, costs)


def test_verdicts_by_hand() -> None:
    runs, costs = study_by_hand()
    less, (low, high) = sparse_dense.less_accurate(runs, "dense_total", "next_token")
    differences = np.array([0.005 / 0.5, 0.005 / 0.51, 0.005 / 0.52])
    assert less == pytest.approx(differences.mean())
    half = 4.303 * differences.std(ddof=1) / 3**0.5  # t of two degrees of freedom
    assert (low, high) == pytest.approx((less - half, less + half), rel=1e-3)
    assert sparse_dense.ratio(costs["training, 8 rows"], "dense_total", "seconds") == (5.0, (5.0, 5.0))
    text = sparse_dense.tables(runs, costs)
    assert "- 4.2 times faster, training, 8 rows: holds: 5.00 times" in text
    assert "- 68% less energy, decoding, 1 row, as compiled: holds: 75.0% less" in text
    assert "- 68% less energy, decoding, 1 row, of the least traffic: holds: 93.8% less" in text
    assert "- at most 2.1% less accurate, next token: holds: +1.0% less" in text
    assert "- at most 2.1% less accurate, rest of a line: does not hold: +10.0% less" in text
    assert (
        "| training, 8 rows | dense_total | 5.0 M (5.00) | 5,000,000 µs (5.00; 5.00 to 5.00) | 4.0 µJ (4.00) |" in text
    )
    assert sparse_dense.less_accurate(study_by_hand(1)[0], "dense_total", "next_token") is None
    nothing = [run | {"exact_line": 0.0} for run in runs]
    assert "rest of a line: not decided: too few runs, or none right" in sparse_dense.tables(nothing, costs)


@pytest.mark.parametrize(
    ("low", "high", "at_least", "want"),
    [(4.2, 5, True, "holds"), (4.1, 4.3, True, "not decided"), (3, 4.1, True, "does not hold")]
    + [(0, 4.2, False, "holds"), (4.1, 4.3, False, "not decided"), (4.3, 5, False, "does not hold")],
)
def test_a_verdict_needs_the_whole_interval(low: float, high: float, at_least: bool, want: str) -> None:
    assert sparse_dense.verdict(low, high, 4.2, at_least=at_least) == want


def test_the_sparse_study_goes_on_where_it_stopped(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, costs = study_by_hand(2)
    kept, made = tmp_path / "kept.jsonl", []
    lines = [{"rounds": 6, "costs": costs}, *runs[:4], runs[0] | {"steps": 8}]
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def one(variant: str, seed: int, steps: int) -> dict[str, Any]:
        made.append((variant, seed, steps))
        return next(run for run in runs if (run["variant"], run["seed"]) == (variant, seed))

    monkeypatch.setattr(sparse_dense, "study_one", one)
    for _ in range(2):
        assert sparse_dense.study(2, 7, 6, kept, lambda text: None) == (runs, costs)
    assert made == [("dense_total", 1, 7), ("dense_active", 1, 7)]
    sparse_dense.plot(runs, costs, tmp_path / "a" / "picture.png")
    assert (tmp_path / "a" / "picture.png").stat().st_size > 10_000


def test_flops_of_a_decoded_token_are_those_of_arithmetic() -> None:
    program = make_program(sparse_dense.config_of("mixture"), "decode", jax.devices()[:1])
    counted = count_flops(program.traced.jaxpr, platform="cpu", ragged_share=program.ragged_share)
    assert counted.executed == pytest.approx(program.model_flops, rel=0.01)  # padding of the cache to whole pages


def test_least_traffic_of_decoding_by_hand() -> None:
    dense, mixture = (sparse_dense.config_of(variant) for variant in ("dense_total", "mixture"))
    outside, cache = 1024 * 256, 3 * 256 * 2 * 64 * 2  # the output matrix; keys and values of one row in bfloat16
    total, active = sparse_dense.own_params(mixture.model)
    assert sparse_dense.least_bytes(dense, 4) == 2 * (sparse_dense.own_params(dense.model)[0] + outside) + 4 * cache
    assert sparse_dense.least_bytes(mixture, 1) == pytest.approx(2 * (active + outside) + cache)
    # Two rows visit two experts each, of 16: an expert is idle with a chance of (7/8)**2.
    expert, idle = 3 * 256 * 272, 16 * (7 / 8) ** 2
    assert sparse_dense.least_bytes(mixture, 2) == pytest.approx(2 * (total - 3 * idle * expert + outside) + 2 * cache)
