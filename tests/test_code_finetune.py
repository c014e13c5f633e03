"""The parts of fine-tuning for code: expected risk, the course, candidates, rewards, rollouts, the best epoch."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from models import DENSE, V

from benchmarks.code_finetune import ARMS, MEASURES, Material, config_of, rows_of, write_material
from dsjax.config import UserError
from dsjax.data.batch import Batch
from dsjax.data.tasks.records import read
from dsjax.data.tokenizer import Tokenizer, train_tokenizer
from dsjax.infer.sampling import SamplingConfig
from dsjax.models.decoder import ComputeConfig, Decoder
from dsjax.nn.masks import Documents
from dsjax.rl.programs import Problem
from dsjax.rl.rewards import reward, shares_passed
from dsjax.rl.risk import Candidates, JudgedBatch, expected_risk, risk, target_log_probs
from dsjax.rl.rollout import Rollout, Sampler
from dsjax.rl.sandbox import Program, Sandbox
from dsjax.sharding import MeshConfig, make_mesh
from dsjax.train.candidates import Agenda, Prompt, RiskConfig, candidate_rows, longest_row, prompts_of, with_candidates
from dsjax.train.code_finetune import joint_loss
from dsjax.train.curriculum import (
    CourseConfig,
)
from dsjax.train.optimizer import OptimConfig
from dsjax.train.selection import best_of
from dsjax.train.step import make_trainer

END = 0

# ---------------------------------------------------------------- expected risk


def test_two_equal_texts_of_which_one_is_right() -> None:
    score, rewards, counts = jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]), jnp.ones((1, 2), bool)
    value, slope = jax.value_and_grad(lambda s: expected_risk(s, rewards, counts, 2.0)[0])(score)
    assert float(value) == 0.5  # half of the probability is on the wrong one
    # alpha q (mean - reward) = 2 * 1/2 * (1/2 - 1) and 2 * 1/2 * (1/2 - 0)
    assert slope.tolist() == [[-0.5, 0.5]]


def test_texts_that_do_not_count_have_no_part() -> None:
    counts = jnp.array([[True, False, True]])
    value, slope = jax.value_and_grad(lambda s: expected_risk(s, jnp.array([[1.0, 0.0, 0.0]]), counts, 1.0)[0])(
        jnp.array([[0.0, 50.0, math.log(3)]])
    )
    assert float(value) == pytest.approx(0.75, abs=1e-6)  # q = 1/4 and 3/4; one float32 softmax
    np.testing.assert_allclose(slope, [[-3 / 16, 0, 3 / 16]], atol=1e-6)


@pytest.mark.parametrize("counts", [[False, False], [True, False]])
def test_fewer_than_two_texts_teach_nothing(counts: list[bool]) -> None:
    slope = jax.grad(lambda s: expected_risk(s, jnp.array([[1.0, 0.0]]), jnp.array([counts]), 1.0)[0])(
        jnp.array([[0.3, -2.0]])
    )
    assert slope.tolist() == [[0.0, 0.0]]


@given(st.data(), st.integers(2, 6), st.floats(0.01, 4))
@settings(max_examples=50, deadline=None)
def test_risk_is_what_the_formula_says(data: st.DataObject, K: int, alpha: float) -> None:
    floats = lambda low, high: st.lists(st.floats(low, high, width=32), min_size=K, max_size=K)  # noqa: E731
    score, rewards = np.array(data.draw(floats(-20, 0))), np.array(data.draw(floats(0, 1)))
    q = np.exp(alpha * (score - score.max()))
    q /= q.sum()
    value, slope = jax.value_and_grad(
        lambda s: expected_risk(s[None], jnp.asarray(rewards)[None], jnp.ones((1, K), bool), alpha)[0]
    )(jnp.asarray(score, jnp.float32))
    # float32: scores of up to 80 have a relative error of 2**-24, so exponents one of 5e-6
    assert float(value) == pytest.approx(float(np.sum(q * (1 - rewards))), abs=5e-5)
    np.testing.assert_allclose(slope, alpha * q * (np.sum(q * rewards) - rewards), atol=5e-5 * alpha)
    assert abs(float(slope.sum())) < 1e-5 * alpha  # what all have in common does not count


# ---------------------------------------------------------------- in a model


def model_of(chunk: int = 0) -> Decoder:
    return Decoder(DENSE, ComputeConfig(loss_chunk=chunk), rngs=nnx.Rngs(0))


def rollout_of(tokens: list[int], *, ended: bool) -> Rollout:
    return Rollout(tuple(tokens), (-1.0,) * (len(tokens) + ended), "", ended)


def some_candidates(P: int = 2, K: int = 3, T: int = 12, seed: int = 0) -> Candidates:
    """Random texts behind prompts of three tokens; the last of each prompt ended by its length."""
    rng = np.random.default_rng(seed)
    prompts = [[END, *rng.integers(1, V, 2).tolist()] for _ in range(P)]
    found = [
        [rollout_of(rng.integers(1, V, rng.integers(1, T - 3)).tolist(), ended=k < K - 1) for k in range(K)]
        for _ in range(P)
    ]
    return candidate_rows(prompts, found, rng.random((P, K)).tolist(), length=T, end_id=END)


@pytest.mark.parametrize("chunk", [0, 5])
def test_log_probabilities_of_targets_are_those_of_the_logits(chunk: int) -> None:
    model, found = model_of(chunk), jax.tree.map(jnp.asarray, some_candidates())
    got_PKT = target_log_probs(model, found)
    for p, k in np.ndindex(*found.reward_PK.shape):
        length = int(found.ids_PKT[p, k].sum())  # alone, without anything behind
        tokens = found.tokens_PKT[p, k, :length][None]
        documents = Documents(jnp.ones_like(tokens), jnp.arange(length)[None])
        expected = jax.nn.log_softmax(model.logits(model(tokens, documents)))[0]
        targets = found.targets_PKT[p, k, :length]
        # float32 through three layers; rows of other lengths sum in another order
        np.testing.assert_allclose(got_PKT[p, k, :length], expected[jnp.arange(length), targets], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per_token", [True, False])
def test_scores_are_sums_or_means_over_the_text_alone(per_token: bool) -> None:
    model, found = model_of(), jax.tree.map(jnp.asarray, some_candidates())
    log_prob = np.asarray(target_log_probs(model, found)) * np.asarray(found.learned_PKT)
    score = log_prob.sum(-1) / (np.asarray(found.learned_PKT).sum(-1) if per_token else 1)
    q = np.exp(0.3 * (score - score.max(-1, keepdims=True)))
    q /= q.sum(-1, keepdims=True)
    value, _ = risk(model, found, alpha=0.3, per_token=per_token)
    expected = np.mean(np.sum(q * (1 - np.asarray(found.reward_PK)), -1))
    assert float(value) == pytest.approx(expected, rel=1e-5)  # a float32 softmax


def plain_batch(B: int = 8, T: int = 12) -> Batch:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    documents = Documents(np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1)))
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((B, T), np.float32), documents)


def stepped(num_devices: int, accumulate: int, mesh_config: MeshConfig = MeshConfig(), steps: int = 1) -> Any:
    """Metrics and parameters behind some steps on one batch with candidates."""
    mesh = make_mesh(mesh_config, jax.devices()[:num_devices])
    cfg = RiskConfig(weight=2.0)
    trainer = make_trainer(
        lambda rngs: Decoder(DENSE, ComputeConfig(), rngs=rngs),
        OptimConfig(lr=3e-3, warmup_steps=0, schedule="constant"),
        mesh,
        accumulate=accumulate,
        loss_fn=joint_loss(cfg),
    )
    batch = with_candidates(plain_batch(), some_candidates(P=8), mesh)
    state = trainer.init(np.uint32(0))
    for _ in range(steps):
        state, metrics = trainer.step(state, batch, 10)
    return jax.device_get((metrics, state.params))


def test_micro_batches_and_devices_change_no_step() -> None:
    metrics, params = stepped(1, 1)
    assert metrics["loss/risk"] > 0
    for other in (stepped(1, 4), stepped(8, 2, MeshConfig(data=2, fsdp=2, tensor=2))):
        # float32: sums over micro-batches and devices are made in another order; Adam's first step is a sign, so what
        # is nearly 0 may differ by the whole step of 3e-3
        for name in ("loss", "loss/risk", "risk/reward", "grad_norm"):
            assert other[0][name] == pytest.approx(metrics[name], rel=1e-4), name
        close = jax.tree.map(lambda x, y: np.isclose(x, y, atol=1e-5).mean(), params, other[1])
        assert min(jax.tree.leaves(close)) > 0.98


def test_texts_with_more_reward_become_likelier() -> None:
    """A bandit of three texts for each prompt, with cross-entropy on other tokens beside it."""
    found = jax.tree.map(jnp.asarray, some_candidates(P=8))
    before = stepped(1, 1)[0]["loss/risk"]
    after = stepped(1, 1, steps=30)[0]["loss/risk"]
    least = 2.0 * float(jnp.mean(1 - found.reward_PK.max(axis=1)))  # all probability on the best text
    assert after < before - 0.5 * (before - least)


def test_without_candidates_the_loss_is_cross_entropy() -> None:
    model, batch = model_of(), jax.tree.map(jnp.asarray, plain_batch())
    loss, report = joint_loss(RiskConfig())(model, batch, jax.random.key(0), jnp.float32(96))
    assert float(loss) == float(report.metrics["loss"])
    assert "loss/risk" not in report.metrics


# ---------------------------------------------------------------- candidates


def test_rows_of_candidates_by_hand() -> None:
    found = [
        [Rollout((7, 8), (-0.5, -1.0, -0.1), "", True), Rollout((7, 8), (-0.5, -1.0, -0.1), "", True)],
        [Rollout((5,), (-2.0,), "", False), Rollout((), (-3.0,), "", True)],
    ]
    rows = candidate_rows([[END, 3], [END, 4]], found, [[0.25, 0.25], [None, 1.0]], length=6, end_id=END)
    assert rows.tokens_PKT[0, 0].tolist() == [0, 3, 7, 8, 0, 0]
    assert rows.targets_PKT[0, 0].tolist() == [3, 7, 8, 0, 0, 0]
    assert rows.learned_PKT[0, 0].tolist() == [0, 1, 1, 1, 0, 0]  # the text and its end, not the prompt
    assert rows.ids_PKT[0, 0].tolist() == [1, 1, 1, 1, 0, 0]
    np.testing.assert_array_equal(rows.told_PKT[0, 0], np.float32([np.nan, -0.5, -1.0, -0.1, np.nan, np.nan]))
    assert rows.told_PKT[1, :, 1].tolist() == [-2.0, -3.0]
    assert rows.learned_PKT[1, 0].tolist() == [0, 1, 0, 0, 0, 0]  # cut off: no end to be learned
    assert rows.learned_PKT[1, 1].tolist() == [0, 1, 0, 0, 0, 0]  # nothing but its end
    # a text that was there already, and one of which nothing is known, do not count
    assert rows.counts_PK.tolist() == [[True, False], [False, True]]
    assert rows.weight_P.tolist() == [0.5, 0.5]


def test_prompts_without_any_verdict_have_no_weight() -> None:
    found = [[Rollout((7,), (-1.0, -0.1), "", True)] * 2] * 2
    rows = candidate_rows([[END]] * 2, found, [[None, None], [1.0, 0.0]], length=4, end_id=END)
    assert rows.weight_P.tolist() == [0.0, 1.0]
    nothing = candidate_rows([[END]] * 2, found, [[None, None]] * 2, length=4, end_id=END)
    assert nothing.weight_P.tolist() == [0.0, 0.0]


def agenda(num: int, steps: int, *, order: float = 1.0, **cfg: Any) -> Agenda:
    problem = Problem("", "", "", "", "f", [])
    prompts = [Prompt(problem, (n,), n / max(num - 1, 1)) for n in range(num)]
    return Agenda(prompts, RiskConfig(**cfg), CourseConfig(order=order, epochs=2), steps, 0)


def test_an_epoch_goes_through_the_problems_in_the_order_of_the_course() -> None:
    plan = agenda(16, 8, every=2, prompts=2)
    assert [i for i in range(8) if plan.is_due(i)] == [1, 3, 5, 7]
    due = [p.tokens[0] for i in range(8) if plan.is_due(i) for p in plan.prompts(i)]
    assert due == [0, 2, 4, 6, 8, 10, 12, 14]  # eight places, sixteen problems: every second one
    second = [p.tokens[0] for i in range(8, 16) if plan.is_due(i) for p in plan.prompts(i)]
    assert second != sorted(second)  # the last epoch is shuffled
    assert [p.tokens for p in plan.prompts(5)] == [p.tokens for p in plan.prompts(5)]


def test_more_places_than_problems_take_them_again() -> None:
    plan = agenda(3, 4, every=1, prompts=2, order=1.0)
    assert [p.tokens[0] for i in range(4) for p in plan.prompts(i)] == [0, 1, 2, 0, 1, 2, 0, 1]


def test_rows_have_few_lengths() -> None:
    problem = Problem("", "", "", "", "f", [])
    prompts = [Prompt(problem, tuple(range(n)), 0.0) for n in (3, 70)]
    assert longest_row(prompts, 50, 256, 1) == 128
    assert longest_row(prompts, 50, 256, 4) == 256
    assert longest_row(prompts, 50, 120, 1) == 120


@functools.cache
def words() -> Tokenizer:
    return train_tokenizer(["def f(x):\n    return x\n\n"] * 3, 300)


# ---------------------------------------------------------------- rewards


def test_reward_by_hand() -> None:
    likeness = lambda text, reference: 0.5  # noqa: E731
    assert reward(0.25, "a", "b", likeness, 0.5) == 0.375
    assert reward(0.25, "a", "", likeness, 0.5) == 0.25  # no solution is known: tests alone
    assert reward(0.25, "a", "b", likeness, 0.0) == 0.25
    assert reward(None, "a", "b", likeness, 0.5) is None
    assert reward(None, "a", "b", likeness, 1.0) == 0.5


def test_programs_get_the_share_of_tests_that_they_pass() -> None:
    tests = [((1,), 2), ((2,), 4), ((3,), 6), ((0,), 0)]
    codes = ["def f(x): return 2 * x", "def f(x): return x + 1", "def f(x): return 2 *", "def f(x): return 2 * x"]
    programs = [Program(code, tests, "f") for code in codes]
    strange = Program(
        "def f(x): return x", "import missing_module\ndef check(candidate):\n    assert candidate(1)", "f"
    )
    with Sandbox(workers=1) as sandbox:
        assert shares_passed(sandbox, [*programs, strange]) == [1.0, 0.25, 0.0, 1.0, None]


# ---------------------------------------------------------------- problems


def test_problems_begin_as_documents_do_and_fit(tmp_path: pathlib.Path) -> None:
    lines = [
        {"entry_point": "f", "tests": [[[1], 2]], "prompt": "def f(x):\n", "solution": "    return 2 * x\n"},
        {"entry_point": "g", "tests": [[[1], 2]], "prompt": f"def g(x):\n    '''{'long ' * 40}'''\n"},
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = words()
    (found,) = prompts_of(RiskConfig(problems=str(path), max_tokens=16), tokenizer, 48, 0)
    assert found.tokens == (tokenizer.end_id, *tokenizer.encode("def f(x):\n").tolist())
    with pytest.raises(UserError, match=r"risk\.max_tokens is 64 and data\.seq_len 48: of 2 problems none"):
        prompts_of(RiskConfig(problems=str(path), max_tokens=64), tokenizer, 48, 0)


def test_generated_problems_go_from_level_to_level_and_none_is_held_out() -> None:
    found = prompts_of(RiskConfig(num_problems=10, max_tokens=16), words(), 4096, 0)
    assert [p.stage for p in found] == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1]


# ---------------------------------------------------------------- rollouts


def test_rollouts_depend_on_nothing_but_weights_prompts_and_seed() -> None:
    graph, variables = nnx.split(Decoder(dataclasses.replace(DENSE, vocab_size=300), ComputeConfig(), rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(variables)
    other = jax.tree.map(lambda x: x * 1.5, params)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    prompts = [[END, *range(1, 40)], [END, 5]]

    def sample(sampler: Sampler, params: Any, seed: int) -> Any:
        options = {"num_samples": 3, "max_tokens": 6, "sampling": SamplingConfig(1.0, top_p=1.0)}
        return sampler.sample(params, prompts, seed=seed, **options)

    one = Sampler(graph, words(), mesh, num_rows=4, max_length=64)
    first = sample(one, params, 0)
    changed = sample(one, other, 0)
    assert sample(one, params, 0) == first  # as if nothing had been between
    assert changed == sample(Sampler(graph, words(), mesh, num_rows=4, max_length=64), other, 0) != first
    assert sample(one, params, 1) != first
    assert len({rollout.tokens for own in first for rollout in own}) == 6
    model = nnx.merge(graph, jax.tree.map(jnp.asarray, params))
    for prompt, own in zip(prompts, first, strict=True):
        for rollout in own:
            row = jnp.array([[*prompt, *rollout.tokens]])
            documents = Documents(jnp.ones_like(row), jnp.arange(row.shape[1])[None])
            log_probs = jax.nn.log_softmax(model.logits(model(row, documents)))[0, len(prompt) - 1 : -1]
            expected = log_probs[jnp.arange(len(rollout.tokens)), jnp.array(rollout.tokens)]
            np.testing.assert_allclose(rollout.log_probs, expected, atol=1e-5)  # float32, behind a cache


# ---------------------------------------------------------------- selection


def test_the_best_is_the_first_with_the_highest_score() -> None:
    name = "held_out_combined_score"
    records = [{"step": 2, name: 0.5}, {"step": 3, "loss": 1.0}, {"step": 4, name: 0.7}, {"step": 6, name: 0.7}]
    assert best_of(records) == records[2]
    assert best_of([*records, {"step": 8, name: None}]) == records[2]
    assert best_of([{"step": 3, "loss": 1.0}]) is None


def test_a_judged_batch_is_a_batch_of_another_kind() -> None:
    batch = with_candidates(plain_batch(), some_candidates(P=8), make_mesh(MeshConfig(), jax.devices()[:1]))
    assert isinstance(batch, JudgedBatch)
    assert jax.tree.structure(batch) != jax.tree.structure(plain_batch())


# ---------------------------------------------------------------- the table of what each is worth


def test_each_arm_leaves_out_what_it_is_named_after(tmp_path: pathlib.Path) -> None:
    for arm in ARMS:
        config = config_of(arm, 3, tmp_path, tmp_path, ["optim.lr=1e-3"])
        off = {"repairs": config.data.repair is None, "risk": not config.risk.weight, "course": not config.course.order}
        assert {name for name, is_off in off.items() if is_off} == (
            set(off) if arm == "all three" else {arm} & set(off)
        )
        assert (config.data.seed, config.train.seed, config.optim.lr) == (3, 3, 1e-3)


def test_what_an_ingredient_is_worth_is_a_paired_difference() -> None:
    def result(arm: str, seed: int, score: float) -> dict[str, Any]:
        return {"arm": arm, "seed": seed, "cpu_seconds": 10.0} | dict.fromkeys(MEASURES, score)

    scores = {("all", 0): 0.5, ("all", 1): 0.7, ("risk", 0): 0.4, ("risk", 1): 0.4, ("base", 0): 0.1}
    everything, without, base = rows_of([result(arm, seed, score) for (arm, seed), score in scores.items()])
    assert everything[:3] == ["all", "2", "0.600"]
    assert everything[-3:] == ["", "", "10"]
    # differences 0.1 and 0.3: mean 0.2, half of the interval t(0.975, 1) * sd / sqrt(2) = 12.706 * 0.1
    assert without[0] == "without risk"
    assert without[-3] == "+0.200 (-1.071 to +1.471)"
    assert base[0] == "base"
    assert base[-3] == ""


def test_nothing_that_is_judged_by_is_trained_on_or_chosen_by(tmp_path: pathlib.Path) -> None:
    write_material(tmp_path, Material(training=6, select=4, test=8))
    tasks = {name: read(tmp_path / name) for name in ("simple/tasks.jsonl", "hard/tasks.jsonl", "select.jsonl")}
    test = read(tmp_path / "test.jsonl")
    assert [len(own) for own in tasks.values()] == [6, 6, 4]
    assert len(test) == 8
    meanings = {task.meaning for own in tasks.values() for task in own}
    assert not meanings & {task.meaning for task in test}
    assert {task.level for task in tasks["simple/tasks.jsonl"]} <= {1, 2}
    assert {task.level for task in tasks["hard/tasks.jsonl"]} <= {3, 4, 5}
