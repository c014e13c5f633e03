"""The needle task: what is asked can be found in the row, by a search that knows nothing of how rows are made."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import small_runs
from hypothesis import given
from hypothesis import strategies as st
from models import DENSE, graph, logits, weights

from dsjax.config import UserError, to_dict
from dsjax.data.tokenizer import Tokenizer
from dsjax.evals.needle import KINDS, Kind, NeedleConfig, needle_rows
from dsjax.evals.needle_text import DEPTHS, Needle, ask, evaluate_needle, hide, make_needle
from dsjax.nn.structure import StructureConfig
from dsjax.runs import LoadedModel
from dsjax.train.pretrain import run as train

CONFIG = NeedleConfig(length=128, facts=12, questions=4)


def told(row: list[int], name: int) -> tuple[int, int]:
    """What the one fact about a name tells, and where the fact stands."""
    places = [i for i in range(len(row) - 2) if row[i] == CONFIG.FACT and row[i + 1] == name]
    assert len(places) == 1
    return row[places[0] + 2], places[0]


@given(st.sampled_from(KINDS), st.integers(0, 2**31))
def test_answers_stand_in_the_row(kind: Kind, seed: int) -> None:
    rows = needle_rows(CONFIG, kind, 1, seed)
    tokens, targets = rows.tokens_BT[0].tolist(), rows.targets_BT[0].tolist()
    assert tokens[1:] == targets[:-1]
    asked = 0
    for at in np.flatnonzero(rows.question_BT[0]):
        value, place = told(tokens, tokens[at])  # the input there is the name
        assert targets[at] == value
        assert rows.distance_BT[0, at] == at + 1 - place
        asked += 1
    assert asked == CONFIG.questions * (1 if kind == "one" else 2)
    assert rows.question_BT.max() == CONFIG.questions
    assert tokens.count(2 + KINDS.index(kind)) == CONFIG.questions
    assert max(tokens) < CONFIG.vocab_size


def test_needles_lie_anywhere() -> None:
    rows = needle_rows(CONFIG, "one", 200, seed=0)
    far = rows.distance_BT[rows.question_BT > 0]
    assert far.min() < 20
    assert far.max() > 115


def test_a_question_is_right_when_all_of_its_answer_is() -> None:
    rows = needle_rows(CONFIG, "two", 2, seed=0)
    assert rows.share_right(rows.targets_BT) == 1
    first = np.flatnonzero(rows.question_BT[1])[0]
    predicted = np.where(rows.question_BT > 0, rows.targets_BT, 0)
    predicted[1, first] += 1
    assert rows.share_right(predicted) == 1 - 1 / 8


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"12 facts and 4 questions \(one\) do not fit into 40 tokens"):
        needle_rows(dataclasses.replace(CONFIG, length=40), "one", 1, 0)


# ---------------------------------------------------------------- in text


class Letters(Tokenizer):
    """A tokenizer whose tokens are characters, and pairs of a space and a digit."""

    def __init__(self) -> None:
        pass

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode(self, text: str) -> np.ndarray:
        ids, i = [], 0
        while i < len(text):
            pair = text[i] == " " and text[i + 1 : i + 2].isdigit()
            ids.append(1000 + int(text[i + 1]) if pair else ord(text[i]))
            i += 2 if pair else 1
        return np.array(ids, np.int32)

    def decode(self, ids: Any, *, skip_special: bool = True) -> str:
        return "".join(f" {i - 1000}" if i >= 1000 else chr(i) for i in ids)


LETTERS = Letters()
TEXT = [LETTERS.encode(f"line {n}\n") for n in range(10)]


@given(st.sampled_from(KINDS), st.integers(0, 2**31), st.integers(150, 400))
def test_facts_are_hidden_between_lines(kind: Kind, seed: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    needle = make_needle(kind, rng)
    sample = hide(needle, TEXT, LETTERS, length, rng)
    assert len(sample.with_facts) == len(sample.without) == length + 1
    text, plain = LETTERS.decode(sample.with_facts), LETTERS.decode(sample.without)
    hay = text
    for fact in needle.facts:
        assert text.count("\n" + fact) == 1
        assert fact not in plain
        hay = hay.replace("\n" + fact, "")
    whole = needle.question + needle.answer
    assert text.endswith(whole)
    assert plain.endswith(whole)
    assert plain.startswith(hay.removesuffix(whole))  # the same text, a little more of it
    assert all(line.startswith("line ") for line in hay.removesuffix(whole).split("\n")[:-1])
    assert LETTERS.decode(sample.with_facts[-sample.num_answer :]) == needle.answer
    first = min(text.index("\n" + fact) for fact in needle.facts)
    assert len(LETTERS.encode(text[:first])) == pytest.approx(sample.depth * length)


def test_facts_lie_anywhere_in_rows_far_longer_than_the_text() -> None:
    rng = np.random.default_rng(0)
    depths = [hide(make_needle("one", rng), TEXT, LETTERS, 2000, rng).depth for _ in range(100)]
    assert {int(depth * DEPTHS) for depth in depths} == set(range(DEPTHS))


def test_a_token_across_question_and_answer_is_answered() -> None:
    class Merged(Letters):
        def encode(self, text: str) -> np.ndarray:
            return super().encode(text.replace("== 4", "=\x01"))

    needle = Needle(("a = 4\n",), "\nassert a ==", " 4\n")
    sample = hide(needle, TEXT, Merged(), 50, np.random.default_rng(0))
    assert sample.with_facts[-sample.num_answer :].tolist() == [1, ord("\n")]


def test_a_row_too_short_is_refused() -> None:
    with pytest.raises(UserError, match=r"--length is 20; facts and question alone take \d+ tokens"):
        hide(make_needle("two", np.random.default_rng(0)), TEXT, LETTERS, 20, np.random.default_rng(0))


def test_a_run_is_asked(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train(small_runs.small(str(small_runs.home() / "corpus")), run, quiet=True)
    report = evaluate_needle(run, length=150, num_samples=3, batch_size=2, quiet=True)
    assert json.loads((run / "needle.json").read_text()) == report
    assert (run / "needle.png").read_bytes().startswith(b"\x89PNG")
    assert set(report["kinds"]) == set(KINDS)
    for kind in report["kinds"].values():
        assert 0 <= kind["interval"][0] <= kind["right"] <= kind["interval"][1] <= 1
    assert "| hops |" in capsys.readouterr().out


def test_a_model_with_structure_is_not_asked(tmp_path: pathlib.Path) -> None:
    config = small_runs.small()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, structure=StructureConfig()))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    with pytest.raises(UserError, match=r"has model\.structure; --task needle asks only models that are told no str"):
        evaluate_needle(tmp_path, quiet=True)


def test_answers_are_judged_by_the_model_alone() -> None:
    """Against whole logits; two rows whose answers differ in length stand in one batch."""
    rng = np.random.default_rng(0)
    cfg = dataclasses.replace(DENSE, vocab_size=1100)
    model = LoadedModel(graph(cfg), weights(cfg), LETTERS, None, 0)
    samples = [hide(make_needle(kind, rng), TEXT, LETTERS, 100, rng) for kind in ("one", "two")]
    assert samples[0].num_answer != samples[1].num_answer

    def judged(row: np.ndarray, num_answer: int) -> tuple[bool, float]:
        scores = logits(cfg, model.params, row[None, :-1])[0, -num_answer:].astype(np.float64)
        log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        answer = row[-num_answer:]
        return bool((scores.argmax(-1) == answer).all()), float(log_p[np.arange(num_answer), answer].sum() / np.log(2))

    for sample, (right, saved) in zip(samples, ask(model, samples), strict=True):
        with_facts, without = (judged(row, sample.num_answer) for row in (sample.with_facts, sample.without))
        assert right == with_facts[0]
        # log-probabilities near 10, in float32
        assert saved == pytest.approx(with_facts[1] - without[1], abs=1e-3)
