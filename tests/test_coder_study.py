"""The arithmetic of the coder study, and a small piece of each of its runs."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from benchmarks import coder_language, coder_solving
from benchmarks.kept import KeptLines
from benchmarks.paired import difference, ratio
from dsjax.data.batch import Batch
from dsjax.data.structure.stored import scanner
from dsjax.data.tokenizer import train_tokenizer
from dsjax.nn.masks import Documents


def test_the_difference_of_pairs() -> None:
    found = difference([1.0, 2.0, 3.0])
    # Mean 2, standard deviation 1, t_0.975 with 2 degrees of freedom 4.3027: half-width 4.3027 / sqrt(3).
    assert found.mean == 2
    assert (found.low, found.high) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert found.p == 2 / 8  # all signs as they are, or all turned around
    assert difference([1, -1, 1, -1]).p == 1
    assert difference([2, 3, 4, 5, 6, 7]).p == 2 / 64  # the least that six pairs can give
    with pytest.raises(ValueError, match="two"):
        difference([1.0])


def test_the_ratio_of_sums() -> None:
    middle, low, high = ratio([2, 4], [1, 2])
    assert (middle, low, high) == (2, 2, 2)
    middle, low, high = ratio([1, 3], [1, 1])
    assert (middle, low, high) == (2, 1, 3)
    assert ratio([1, 1], [0, 0])[0] == np.inf


def test_kept_lines_are_not_made_again(tmp_path: pathlib.Path) -> None:
    made = []

    def make() -> dict[str, float]:
        made.append(1)
        return {"value": 1.5}

    path = tmp_path / "runs" / "kept.jsonl"
    assert KeptLines(path).get(make, arm="a", seed=0) == {"arm": "a", "seed": 0, "value": 1.5}
    kept = KeptLines(path)  # another process
    assert kept.get(make, arm="a", seed=0)["value"] == 1.5
    assert len(made) == 1
    kept.get(make, arm="a", seed=1)
    assert [json.loads(line)["seed"] for line in path.read_text().splitlines()] == [0, 1]


def _language_line(arm: str, seed: int, bits: float, parses: float, rate: float = 1.0) -> dict[str, object]:
    return {
        "part": "language",
        "arm": arm,
        "seed": seed,
        "rate": rate,
        "steps": 10,
        "num_params": 10**6,
        "training_seconds": 2.0 if arm == "plain" else 3.0,
        "bits_per_byte": bits,
        "parses": parses,
    }


def test_the_language_part_is_compared_by_seed(tmp_path: pathlib.Path) -> None:
    lines = [
        *(_language_line("plain", seed, 2.0 + seed, 0.1) for seed in range(3)),
        *(_language_line("embeddings", seed, 0.9 * (2.0 + seed), 0.2 + 0.1 * (seed == 2)) for seed in range(3)),
    ]
    found = coder_language.compared(lines, "embeddings")
    assert found["bits"].mean == pytest.approx(-0.1)
    assert found["bits"].high == pytest.approx(-0.1)  # each seed is 10 % lower, however far seeds are apart
    assert found["parses"].mean == pytest.approx((0.1 + 0.1 + 0.2) / 3)
    assert coder_language.times_as_many(lines, "embeddings")[0] == pytest.approx(0.7 / 0.3)
    text = coder_language.tables(lines)
    assert "| embeddings | 1.000 | 3 | 1 | 10 | 3 |" in text
    assert "-10.00% (-10.00% to -10.00%; p = 0.25)" in text

    assert "- 1.5 times as many parse, embeddings: holds: 2.33" in text
    assert "- bits per byte at most 0.5% more, embeddings: holds: -10.00%" in text
    coder_language.plot(lines, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000

    path = tmp_path / "kept.jsonl"
    swept = [_language_line("plain", coder_language.SWEPT_SEED, bits, 0, rate) for rate, bits in ((1, 2.1), (4, 2.0))]
    swept.append(_language_line("embeddings", coder_language.SWEPT_SEED, 1.9, 0))
    path.write_text("".join(json.dumps(line) + "\n" for line in [*swept, _language_line("plain", 0, 1.0, 0, 8)]))
    assert coder_language.best_rate(KeptLines(path), "plain") == 4  # seeds of the verdicts do not count
    assert coder_language.as_long_as(KeptLines(path), "embeddings", "plain") == round(coder_language.STEPS * 3 / 2)


def test_rows_by_themselves() -> None:
    texts = ["def f(x):\n    if x:\n        return (x,\n", "class A:\n    def g(self):\n        pass\n"]
    tokenizer = train_tokenizer(texts, 300)
    first = scanner("python", tokenizer)
    one, other = (tokenizer.encode(text) for text in texts)
    row = np.concatenate((one[-4:], other[:6]))
    documents = Documents(np.array([[1] * 4 + [2] * 6]), np.zeros((1, 10), np.int32))
    whole_TC = np.concatenate((first.copy().scan(one)[-4:], first.copy().scan(other)[:6]))
    batch = Batch(row[None], row[None], np.ones((1, 10), np.float32), documents, whole_TC[None])
    alone_TC = coder_language.seen_alone(batch, first).features_BTC[0]
    assert np.array_equal(alone_TC[:4], first.copy().scan(one[-4:]))
    assert not np.array_equal(alone_TC[:4], whole_TC[:4])  # the bracket was opened in front of the row
    assert np.array_equal(alone_TC[4:], whole_TC[4:])  # this document begins in it


def test_every_arm_has_the_parameters_of_the_plain_one() -> None:
    plain = coder_language.config_of("plain")
    for name, arm in coder_language.ARMS.items():
        config = coder_language.config_of(arm.config)
        assert config.model.num_params() == pytest.approx(plain.model.num_params(), rel=1e-3), name
        assert dataclasses.replace(config.data, layout=False) == plain.data
        assert (config.optim, config.train, config.compute) == (plain.optim, plain.train, plain.compute)
        assert not arm.rate_of or arm.rate_of in coder_language.SWEPT


def _solving_line(arm: str, seed: int, right: tuple[int, int, int]) -> dict[str, object]:
    return {
        "part": "solving",
        "arm": arm,
        "seed": seed,
        "solved": {str(n): [r, 10] for n, r in zip(coder_solving.LEVELS, right, strict=True)},
        "parses": 0.9,
        "repairs": {"samples": 10, "exact": 0.5, "parses": 0.6},
        "training_seconds": 60.0,
    }


def test_the_solving_part_is_judged_by_what_was_said_before() -> None:
    plain, coder, mixed = coder_solving.PLAIN, coder_solving.CODER, coder_solving.MIXED
    lines = [
        *(_solving_line(plain, seed, (4, 2, 0)) for seed in range(2)),
        *(_solving_line(coder, seed, (6, 3, 1)) for seed in range(2)),
        *(_solving_line(mixed, seed, (6, 3, 1)) for seed in range(2)),
    ]
    assert coder_solving.solved(lines[0]) == 6 / 30
    assert coder_solving.solved(lines[0], 1) == 0.4
    text = coder_solving.tables(lines)
    assert "- +37% solved: holds: 1.67 times plain's (1.67 to 1.67; 2 seeds)" in text
    assert "- two stages against mixed, solved: +0.0%" in text
    assert "20.0% | 40.0% | 20.0% | 0.0%" in text
    long = {"part": "long", "arm": "coder", "minutes": 20.0, "solved": {"1": [9, 10], "2": [9, 10], "3": [50, 100]}}
    (said,) = coder_solving.long_verdicts([long])
    assert said.startswith("82% of level 3 in 20 CPU minutes, coder: does not hold: 50.0%")


def test_a_language_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps of the arm that does most, on a corpus of three files."""
    config = coder_language.config_of("embeddings")

    root = pathlib.Path(coder_language.__file__).parent

    data = dataclasses.replace(
        config.data,
        sources=(dataclasses.replace(config.data.sources[0], path=str(root)),),
        held_out_share=0.2,
        seq_len=64,
    )
    monkeypatch.setattr(coder_language, "config_of", lambda name: dataclasses.replace(config, data=data))
    line = coder_language.language_run("embeddings_alone", seed=0, rate=2.0, steps=3, samples=4)
    assert line["tokens"] == 3 * data.batch_size * 64
    assert 2 < line["bits_per_byte"] < 8  # of bytes, after three steps
    assert line["samples"] == 4
    assert 0 <= line["parses"] <= 1
    assert 0 < line["training_seconds"] < line["cpu_seconds"]
