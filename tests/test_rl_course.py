"""What reinforcement learning is made of on the host: solutions as documents, the course, updates, who solved what."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import types
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from r1_runs import r1

from dsjax.config import UserError
from dsjax.data.structure.stored import scanner
from dsjax.data.tokenizer import train_tokenizer
from dsjax.evals.solved import Solved, prompt_tokens, solved
from dsjax.infer.sampling import SamplingConfig
from dsjax.models.decoder import DecoderConfig
from dsjax.nn.fields import NUM_FIELDS
from dsjax.nn.structure import StructureConfig
from dsjax.rl.curriculum import Choice
from dsjax.rl.exercises.config import ExercisesConfig, FamilyConfig, families_of
from dsjax.rl.exercises.exercise import Exercise, draw
from dsjax.rl.rollout import Rollout, Sampler
from dsjax.train.course import Course, Worth, Written, metrics_of
from dsjax.train.practice import each_update, split_rows
from dsjax.train.pretrain import Pretrain
from dsjax.train.supervised import exercise_corpus, level_mix, material

TOKENIZER = train_tokenizer([], 257)
NAN = math.nan


def exercise(prompt: str, solution: str, level: int = 1) -> Exercise:
    return Exercise("sort", level, prompt, solution, solution, "exact")


# ---------------------------------------------------------------- solutions


def test_prompts_are_read_and_solutions_learned() -> None:
    training = [exercise("ba\n", "ab"), exercise("x", ""), exercise("c", "c")]
    corpus = exercise_corpus(TOKENIZER, training, [exercise("d", "d")])
    (store,) = corpus.stores
    assert TOKENIZER.decode(np.asarray(store.tokens)) == "ba\nabcc"
    assert np.asarray(store.weights).tolist() == [0, 0, 0, 1, 1, 0, 1]
    assert store.offsets.tolist() == [0, 5, 7]  # what has no solution is left out
    assert [document.text for document in corpus.held_out] == ["dd"]
    assert corpus.report.num_training == 2
    assert corpus.fingerprint != exercise_corpus(TOKENIZER, [exercise("ba\n", "ba"), exercise("c", "c")]).fingerprint


@pytest.mark.parametrize("layout", [False, True])
def test_a_solution_is_read_behind_its_prompt(layout: bool) -> None:
    """Where tokens say how lines are indented relative to those in front, and where a model is told their structure."""
    family = families_of(ExercisesConfig(families=(FamilyConfig("program/list"),)))["program/list"]
    training = draw(family, 2, "training", seed=0, num=4)
    texts = [e.prompt + e.solution for e in training]
    tokenizer = train_tokenizer(texts, 400, layout=layout)
    config = dataclasses.replace(Pretrain(data=r1().data), model=DecoderConfig(structure=StructureConfig()))
    _, corpus, _ = material(tokenizer, training, training, None, config, lambda text: None)
    (store,), at_start = corpus.stores, scanner("python", tokenizer)
    told = np.asarray(store.features).reshape(-1, NUM_FIELDS)
    for number, (begin, end) in enumerate(itertools.pairwise(store.offsets.tolist())):
        tokens, learned = np.asarray(store.tokens[begin:end]), np.asarray(store.weights[begin:end]) > 0
        assert tokenizer.decode(tokens[learned], behind=tokens[~learned]) == training[number].solution
        assert tuple(tokens[~learned].tolist()) == prompt_tokens(tokenizer, training[number])[1:]
        np.testing.assert_array_equal(told[begin:end], at_start.copy().scan(tokens))
        held_out = corpus.held_out[number]
        np.testing.assert_array_equal(held_out.features_TC, at_start.copy().scan(held_out.ids))


def test_a_run_learns_as_many_tokens_as_it_is_told() -> None:
    config = Pretrain(data=r1().data)
    training = [exercise("ba\n", "ab")] * 40
    changed, _, rows = material(TOKENIZER, training, [], 300, config, lambda text: None)
    of_step = 40 * 3 / rows.num_rows * config.data.batch_size  # two letters and the end of each
    assert changed.train.steps == round(300 / of_step)
    same, _, _ = material(TOKENIZER, training, [], None, config, lambda text: None)
    assert same.train.steps == config.train.steps
    none, _, _ = material(TOKENIZER, training, [], 0, config, lambda text: None)
    assert none.train.steps == 1  # of a run that learned nothing the control is soon at its end


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 1000), st.floats(0.01, 1))
def test_of_each_level_there_are_fewer(num_levels: int, num: int, decay: float) -> None:
    mix = level_mix(range(1, 1 + num_levels), num, decay)
    assert sum(mix.values()) == num
    assert all(first >= second - 1 for first, second in zip(mix.values(), list(mix.values())[1:], strict=False))
    assert level_mix((1, 2, 3), 14, 0.5) == {1: 8, 2: 4, 3: 2}


# ---------------------------------------------------------------- updates


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_every_epoch_has_every_row_once(of_part: int, parts: int, epochs: int, seed: int) -> None:
    num = of_part * parts
    found = split_rows(num, epochs, parts, (seed, 7))
    assert len(found) == epochs * parts
    for epoch in range(epochs):
        rows = np.concatenate(found[epoch * parts : (epoch + 1) * parts])
        assert sorted(rows.tolist()) == list(range(num))
    again = split_rows(num, epochs, parts, (seed, 7))
    assert all((a == b).all() for a, b in zip(found, again, strict=True))


def test_a_step_makes_all_updates_and_tells_their_mean() -> None:
    def step(state: int, batch: float, total: int, factor: Any) -> tuple[int, dict[str, float]]:
        assert (total, factor) == (30, None)  # ten iterations of three updates
        policy = {"policy/entropy": batch, "policy/kl_old": batch, "policy/log_prob_gap": batch}
        return state + 1, {"loss": batch, "tokens": 10.0, "finite": float(batch != 3)} | policy

    updates: Any = types.SimpleNamespace(minibatches=(1.0, 2.0, 6.0), metrics={"rl/reward": 0.5})
    state, metrics = each_update(step)(0, updates, 10)
    assert state == 3
    assert (metrics["loss"], metrics["tokens"], metrics["finite"]) == (3.0, 30.0, 1.0)
    assert (metrics["rl/entropy"], metrics["rl/reward"]) == (3.0, 0.5)
    assert metrics["rl/log_prob_gap"] == 1.0  # of the first: behind it the model is another
    updates.minibatches = (1.0, 3.0)
    with pytest.raises(AssertionError):
        each_update(step)(0, updates, 10)
    updates.minibatches = (3.0, 1.0, 1.0)
    assert each_update(step)(0, updates, 10)[1]["finite"] == 0.0  # one bad update is told


def test_of_updates_without_tokens_nothing_is_told() -> None:
    """All groups of a minibatch may be dead: an entropy of 0 would be a collapse."""

    def step(state: int, batch: float, total: int, factor: Any) -> tuple[int, dict[str, float]]:
        policy = {"policy/entropy": batch, "policy/kl_old": batch, "policy/log_prob_gap": batch}
        return state, {"loss": batch, "tokens": float(batch > 0), "finite": 1.0} | policy

    updates: Any = types.SimpleNamespace(minibatches=(0.0, 2.0, 4.0), metrics={})
    metrics = each_update(step)(0, updates, 1)[1]
    assert (metrics["loss"], metrics["rl/entropy"], metrics["rl/log_prob_gap"]) == (3.0, 3.0, 2.0)
    updates.minibatches = (0.0, 0.0)
    assert each_update(step)(0, updates, 1)[1] == {"loss": 0.0, "tokens": 0.0, "finite": 1.0}


# ---------------------------------------------------------------- the course


def course(**parts: Any) -> Course:
    config = r1(**parts)
    return Course(config, families_of(config.exercises), "f" * 64)


def texts(course: Course, choices: list[Choice], right: list[list[float]]) -> tuple[Written, Worth]:
    exercises = tuple(course.exercise(choice) for choice in choices)
    rollout = Rollout((7, 8), (-0.1, -0.25, -1e-7), "ab", True)
    written = Written(tuple(choices), exercises, ((rollout, rollout),) * len(choices))
    correct = np.asarray(right)
    return written, Worth(correct, correct, {"correct": correct, "format": np.ones_like(correct)})


def test_a_course_goes_on_where_it_was_saved() -> None:
    first = course()
    for number in range(5):
        choices = next(first)
        written, worth = texts(first, choices, [[number % 2, 1.0]] * len(choices))
        first.scored(written, first.with_novelty(written, worth, ["x", "y"] * len(choices)))
    first.kl_coef = 0.1 + 0.2
    first.ahead = lambda: written
    state = json.loads(json.dumps(first.get_state()))
    second = course()
    second.set_state(state)
    assert second.get_state() == first.get_state()
    assert second.ahead is not None
    assert second.ahead() == written
    for _ in range(3):
        assert next(first) == next(second)
    other = course()
    assert next(other) != next(first)
    with pytest.raises(UserError, match="the exercises changed"):
        other.set_state(state | {"fingerprint": "0" * 64})


def test_texts_survive_json_with_their_router_decisions() -> None:
    one = course()
    choices = next(one)[:1]
    experts = np.arange(12, dtype=np.int16).reshape(3, 2, 2)
    text = Rollout((1,), (-0.1, -2.0), "\ud800é", True, experts)
    written = Written(tuple(choices), (one.exercise(choices[0]),), ((text,),))
    there = Written.from_plain(json.loads(json.dumps(written.to_plain())), one.exercise)
    assert there == written
    np.testing.assert_array_equal(there.rollouts[0][0].experts, experts)
    assert there.rollouts[0][0].experts.dtype == np.int16


def test_only_the_phase_of_exploration_pays_for_what_is_new() -> None:
    one = course()
    choices = next(one)
    written, worth = texts(one, choices, [[1.0, 0.0]] * len(choices))
    assert one.with_novelty(written, worth, ["a", "b"] * len(choices)) is worth  # foundations
    exploring = course(curriculum={"phases": (r1().curriculum.phases[-1],)})
    paid = exploring.with_novelty(written, worth, ["a", "b"] * len(choices))
    assert (paid.total_PK[:, 0] > 1).all()
    assert (paid.total_PK[:, 1] == 0).all()  # what is wrong is worth nothing for being new
    again = exploring.with_novelty(written, worth, ["a", "b"] * len(choices))
    assert (again.total_PK[:, 0] < paid.total_PK[:, 0]).all()
    assert "novelty" in paid.parts


def test_programs_that_differ_in_names_and_comments_alone_are_one_solution() -> None:
    one = course(curriculum={"phases": (r1().curriculum.phases[-1],)})
    choices = next(one)[:1]
    written, worth = texts(one, choices, [[1.0, 1.0]])
    written = dataclasses.replace(written, exercises=(dataclasses.replace(written.exercises[0], scorer="program"),))
    same = ["def f(xs):\n    return sum(xs)\n", "def f(numbers):\n    # all of them\n    return sum(numbers)\n"]
    shared = one.with_novelty(written, worth, same).parts["novelty"]
    assert shared.tolist() == [[0.5, 0.5]]
    other = one.with_novelty(written, worth, ["def f(xs):\n    return max(xs)\n", same[1]]).parts["novelty"]
    assert other.tolist() == [[1.0, pytest.approx(1 / 3)]]


def test_groups_that_teach_are_told_from_those_that_do_not() -> None:
    total = np.array([[1.0, 1.0], [1.0, 0.0], [NAN, 1.0], [NAN, NAN]])
    form = np.array([[1.0, 0.0], [NAN, 1.0], [1.0, 1.0], [NAN, NAN]])
    worth = Worth(total, total, {"correct": total, "format": form})
    assert worth.alive_P.tolist() == [False, True, False, False]
    some = worth.some([1, 0])
    assert some.alive_P.tolist() == [True, False]
    both = worth + some
    assert both.alive_P.tolist() == [False, True, False, False, True, False]
    one = course()
    written, _ = texts(one, next(one)[:4], total.tolist())
    found = metrics_of(written, worth)
    assert found["rl/length"] == 2
    assert found["rl/format"] == found["reward/format"] == pytest.approx(0.8)


# ---------------------------------------------------------------- who solved what


def test_shares_by_level_by_hand() -> None:
    exercises = tuple(exercise(str(n), "", level) for n, level in enumerate((1, 1, 2)))
    sampled = np.array([[1.0, 0.0, 1.0, NAN], [0.0, 0.0, 0.0, 0.0], [NAN, NAN, NAN, NAN]])
    table = Solved(exercises, sampled, np.array([1.0, 0.0, NAN])).by_level()
    first = table["sort"][1]
    assert first["pass@1"]["value"] == pytest.approx((2 / 3 + 0) / 2)
    assert first["pass@3"]["value"] == pytest.approx(0.5)
    assert (first["exercises"], first["unknown"], first["greedy"]) == (2, 1, 0.5)
    assert "pass@1" not in table["sort"][2]  # of it nothing is known
    assert table["sort"][2]["unknown"] == 4


class Writes(Sampler):
    """Writes the number of the sample, or with temperature 0 what is right."""

    def __init__(self) -> None:
        pass

    def sample(self, params: Any, prompts: Any, *, num_samples: int, sampling: SamplingConfig, **further: Any) -> Any:
        del params, further
        text = lambda n: "ok" if sampling.temperature == 0 else str(n)  # noqa: E731
        return [[Rollout((), (), text(n), False, stopped=True) for n in range(num_samples)] for _ in prompts]


def test_a_model_is_asked_greedily_beside_samples_and_stops_when_told() -> None:
    some = draw(families_of(r1().exercises)["reverse"], 1, "held_out", seed=0, num=5)

    def verdicts(exercises: Any, texts: Any) -> np.ndarray:
        assert all(text.ended for text in texts)  # stopped where it was to stop: it has an answer
        return np.array([float(text.text in ("ok", "2")) for text in texts])

    options: dict[str, Any] = {"num_samples": 4, "max_tokens": 4, "sampling": SamplingConfig(1.0), "seed": 0}
    found = solved(Writes(), None, TOKENIZER, some, verdicts, greedy=True, **options)
    assert found is not None
    assert found.sampled_NK.tolist() == [[0, 0, 1, 0]] * 5
    assert found.greedy_N.tolist() == [1] * 5
    stop: Any = solved(Writes(), None, TOKENIZER, some, verdicts, greedy=False, stopped=lambda: True, **options)
    assert stop is None
