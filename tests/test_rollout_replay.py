"""Rollouts: the router decisions that the engine tells, which the trainer uses; weights that pass between the two."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, V, graph, random_tokens, weights
from test_router_replay import MODELS, SOFTMAX

from dsjax.config import UserError
from dsjax.data.tokenizer import Tokenizer, train_tokenizer
from dsjax.infer.batching import Engine
from dsjax.infer.requests import Completion, Request, Running
from dsjax.infer.sampling import SamplingConfig
from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.models.multi_token import MultiTokenConfig
from dsjax.nn.router import agreement
from dsjax.rl.rollout import Rollout, Sampler
from dsjax.sharding import MeshConfig, logical_axes, make_mesh, shardings

HOT = SamplingConfig(1.0, 0, 1.0)
GAP = 1e-5  # nats: sums of float32 numbers in another order, behind a cache


def engine(name: str, cfg: DecoderConfig | None = None, dtype: str = "float32", **options: Any) -> Engine:
    cfg = cfg or MODELS[name]
    chosen = {"end_ids": (), "max_length": 64, "batch_size": 4, "page_size": 4, "chunk": 8, "steps": 3}
    chosen |= {"tell_experts": True} | options
    return Engine(graph(cfg, dtype=dtype), weights(cfg), **chosen)


LENGTHS = (3, 17, 22, 17)


def requests(tokens: int = 9) -> list[Request]:
    """Some of them begin alike."""
    whole = random_tokens(1, 22, 7, V)[0].tolist()
    prompts = [whole[:n] if n != 3 else [5, 6, 7] for n in LENGTHS]
    return [Request(prompt, tokens, HOT, seed=n, num_samples=1 + n % 2) for n, prompt in enumerate(prompts)]


def completed(made: Engine, wanted: Sequence[Request]) -> list[tuple[list[int], Completion]]:
    """Each prompt with each of its continuations."""
    numbers = [made.submit(request) for request in wanted]
    got = made.run()
    return [(list(r.prompt), c) for r, n in zip(wanted, numbers, strict=True) for c in got[n]]


@functools.cache
def telling(name: str) -> Engine:
    """One for all tests, since it compiles for seconds."""
    return engine(name)


def empty(made: Engine) -> Engine:
    """An engine that knows no prompt."""
    while made.prefixes.forget():
        pass
    return made


@functools.cache
def written(name: str) -> list[tuple[list[int], Completion]]:
    return completed(empty(telling(name)), requests())


@functools.cache
def scorer(name: str, dtype: str) -> Any:
    """(params, tokens_1T, experts) -> log-probabilities of each next token, and what the routers would choose."""

    @jax.jit
    def run(params: Any, tokens_1T: Any, experts_1TLK: Any) -> Any:
        model = nnx.merge(graph(MODELS[name], dtype=dtype), params)
        out = model(tokens_1T, experts_BTLK=experts_1TLK, tell_experts=True)
        return jax.nn.log_softmax(model.logits(out)[0]), out.own_experts_BTLK

    return run


def compare(
    name: str, found: Sequence[tuple[list[int], Completion]], *, replay: bool, dtype: str = "float32"
) -> tuple[float, float]:
    """The largest difference of a log-probability, in nats, and the agreement of routers."""
    gaps, agreed, width = [0.0], [], 64  # one program
    for prompt, c in found:
        row = [*prompt, *c.tokens]
        assert c.experts is not None
        assert c.experts.shape == (len(row), *MODELS[name].decisions)
        assert (c.experts[..., 0] >= 0).all(), "every position was decided"
        tokens_1T, experts = np.zeros((1, width), np.int32), np.full((1, width, *c.experts.shape[1:]), -1, np.int16)
        tokens_1T[0, : len(row)], experts[0, : len(row)] = row, c.experts
        used = experts if replay else np.full_like(experts, -1)
        log_probs_TV, own = scorer(name, dtype)(weights(MODELS[name]), tokens_1T, used)
        at = np.arange(len(prompt) - 1, len(row) - 1)
        gaps += np.abs(np.asarray(log_probs_TV)[at, row[len(prompt) :]] - np.array(c.log_probs)).tolist()
        agreed.append(float(agreement(experts, own, np.arange(width)[None] < len(row))))
    return max(gaps), float(np.mean(agreed))


# ---------------------------------------------------------------- what is told is what was done


@pytest.mark.parametrize(
    "name", ["V3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("softmax", "two kinds"))]
)
def test_the_trainer_agrees_with_the_engine(name: str) -> None:
    """In float32 its routers choose the same by themselves; replayed, they are sent where they went for certain."""
    for replay in (True, False):
        gap, agreed = compare(name, written(name), replay=replay)
        assert gap <= GAP
        assert agreed == 1.0


@pytest.mark.slow
def test_in_bfloat16_replay_keeps_tokens_where_they_went() -> None:
    """Without, some tokens of the trainer go elsewhere, and their log-probabilities are far off."""
    found = completed(engine("V3", dtype="bfloat16"), requests(18))
    gap, _ = compare("V3", found, replay=True, dtype="bfloat16")
    free_gap, free_agreement = compare("V3", found, replay=False, dtype="bfloat16")
    assert free_agreement < 1.0
    assert gap < free_gap


def test_one_decision_that_was_told_wrong_is_seen() -> None:
    prompt, c = written("V3")[2]
    assert c.experts is not None
    wrong = c.experts.copy()
    wrong[len(prompt) // 2, 0] = [e for e in range(8) if e not in wrong[len(prompt) // 2, 0]][:2]
    gap, agreed = compare("V3", [(prompt, dataclasses.replace(c, experts=wrong))], replay=True)
    assert gap > 10 * GAP
    assert agreed < 1.0


def test_an_engine_that_tells_writes_what_others_write() -> None:
    plain = completed(engine("V3", tell_experts=False), requests())
    assert [c for _, c in plain] == [c for _, c in written("V3")]
    assert all(c.experts is None for _, c in plain)


def test_a_model_without_experts_has_nothing_to_tell() -> None:
    assert not engine("", DENSE).tell_experts


# ---------------------------------------------------------------- whatever else the engine does


def equal(found: Sequence[tuple[list[int], Completion]], expected: Sequence[tuple[list[int], Completion]]) -> None:
    for (_, c), (_, other) in zip(found, expected, strict=True):
        assert c.tokens == other.tokens
        np.testing.assert_array_equal(c.experts, other.experts)


def test_a_prompt_that_is_taken_over_is_told_as_well() -> None:
    """By pages, and as a whole by the second sample of a request."""
    expected = written("V3")[-2:]
    made, request = empty(telling("V3")), requests()[3]
    reused = made.counts.reused
    equal(completed(made, [request]), expected)
    whole = made.counts.reused
    assert whole == reused + len(request.prompt)
    equal(completed(made, [dataclasses.replace(request, num_samples=1)]), expected[:1])
    assert made.counts.reused > whole


def begun(made: Engine, tokens: int) -> tuple[int, Running]:
    """A request of one continuation, a few tokens of which are there."""
    number = made.submit(dataclasses.replace(requests(tokens)[3], num_samples=1))
    while not (running := made.running()) or running[0].num_new < 3:
        made.step()
    return number, running[0]


def test_what_had_to_give_its_row_back_is_told_as_it_was() -> None:
    made = empty(telling("V3"))
    number, running = begun(made, 9)
    made._preempt(running)
    empty(made)
    (found,), (_, expected) = made.run()[number], written("V3")[-2]
    assert found.tokens == expected.tokens[-len(found.tokens) :]  # those that came since
    np.testing.assert_array_equal(found.experts, expected.experts)


def test_decisions_that_are_known_are_used_when_it_is_computed_again() -> None:
    """Planted ones, before the row is given back: they are there afterwards, and change what follows."""
    made = empty(telling("V3"))
    number, running = begun(made, 20)
    (plain,) = made.run()[number]
    empty(made)
    number, running = begun(made, 20)
    assert running.experts_SLK is not None
    made._preempt(running)
    empty(made)
    running.experts_SLK[2:19, 0] = planted = (running.experts_SLK[2:19, 0] + 3) % 8
    (c,) = made.run()[number]
    assert c.experts is not None
    np.testing.assert_array_equal(c.experts[2:19, 0], planted)
    rest = slice(len(plain.tokens) - len(c.tokens), None)
    assert np.abs(np.array(c.log_probs) - np.array(plain.log_probs)[rest]).max() > 1e-3
    empty(made)  # of what was planted nothing stays


@pytest.mark.slow
def test_pages_that_run_out_change_nothing() -> None:
    made = engine("V3", num_positions=72)
    equal(completed(made, requests()), written("V3"))
    assert made.counts.preempted > 0


@pytest.mark.slow
def test_drafts_are_told_of_what_was_accepted() -> None:
    cfg = dataclasses.replace(MODELS["V3"], multi_token=MultiTokenConfig())
    made = engine("V3", cfg, draft=2)
    drafted = completed(made, requests())
    equal(drafted, completed(engine("V3", cfg), requests()))
    assert made.counts.drafts.accepted > 0


@pytest.mark.slow
def test_eight_devices_tell_what_one_tells() -> None:
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    equal(completed(engine("V3", mesh=mesh), requests()), written("V3"))


class Anything:
    """A grammar of all texts: with one, the host has a say in each step."""

    no_end = False

    def row(self, left: int) -> np.ndarray:
        return np.full(-(-V // 8), 255, np.uint8)

    def add(self, token: int) -> None: ...

    def ends_well(self) -> bool:
        return True


@pytest.mark.parametrize("kind", ["one CPU", pytest.param("mesh", marks=pytest.mark.slow)])
def test_what_the_host_has_a_say_in_is_told_as_well(kind: str) -> None:
    """In a loop on one CPU that asks it; elsewhere by two programs a step."""
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2)) if kind == "mesh" else None
    made = engine("V3", mesh=mesh) if mesh else empty(telling("V3"))
    numbers = [made.submit(request) for request in requests()]
    for running in made.waiting:
        running.constraint = Anything()  # type: ignore[assignment]
    got = made.run()
    equal([([], c) for number in numbers for c in got[number]], written("V3"))


# ---------------------------------------------------------------- the sampler

WORDS = 296  # divides over eight devices
MOE = DecoderConfig(
    WORDS, 32, 2, (LayerGroup(SOFTMAX, dataclasses.replace(MODELS["softmax"].groups[0].attention, num_heads=8,
                                                          num_kv_heads=8)),),
)  # fmt: skip


@functools.cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(["def f(x):\n    return x\n\n"] * 3, WORDS)


def sampler(mesh: Any = None, cfg: DecoderConfig = MOE, **options: Any) -> Sampler:
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    return Sampler(graph(cfg), tokenizer(), mesh, **{"num_rows": 8, "max_length": 48, "tell_experts": True} | options)


@functools.cache
def alone() -> Sampler:
    """On one CPU; it compiles once for all tests."""
    return sampler()


PROMPTS = ([0, 5, 6, 7], [0, *range(40, 60)])


def sample(made: Sampler, params: Any, **options: Any) -> list[list[Rollout]]:
    return made.sample(params, PROMPTS, **{"num_samples": 2, "max_tokens": 12, "seed": 0, "sampling": HOT} | options)


def test_a_rollout_tells_its_decisions() -> None:
    found = sample(alone(), weights(MOE))
    for prompt, own in zip(PROMPTS, found, strict=True):
        for rollout in own:
            assert rollout.experts is not None
            assert rollout.experts.shape == (len(prompt) + len(rollout.tokens), *MOE.decisions)
            assert rollout.experts.min() >= 0


def test_a_text_ends_by_itself_by_a_stop_string_or_by_its_length() -> None:
    params = weights(MOE)
    (whole, *_), _ = sample(alone(), params)
    assert (whole.ended, whole.stopped, len(whole.tokens)) == (False, False, 12)
    assert len(whole.log_probs) == 12
    word = whole.text[len(whole.text) // 2 :][:2]
    (found, *_), _ = sample(alone(), params, stop=[word])
    assert (found.ended, found.stopped) == (False, True)
    assert found.text == whole.text[: whole.text.index(word)]
    assert found.tokens == whole.tokens[: len(found.tokens)]
    assert len(found.log_probs) == len(found.tokens) < 12
    ends = jax.tree.map(jnp.array, params)
    ends["w_logits"] = 0 * ends["w_logits"]  # every token is as likely as the others
    ended = [r for own in sample(alone(), ends, num_samples=60) for r in own if r.ended]
    assert ended, "of 120 texts of 12 tokens, one in 296 of which ends it, 4.7 do"
    assert all(len(r.log_probs) == len(r.tokens) + 1 for r in ended), "that of the end, too"
    assert all(r.log_probs[-1] == pytest.approx(-np.log(WORDS), abs=1e-5) for r in ended)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[0, 1], [0] * 37], {}, "prompt 1 has 37 tokens, and max_tokens is 12; .* at most 48 positions"),
        ([[0] * 48], {}, "a prompt has 48 tokens; the engine holds 48"),
        ([[0], []], {}, "a prompt is empty"),
        ([[0]], {"max_tokens": 0}, "max_tokens of a request is 0"),
        ([[0]], {"num_samples": 0}, "num_samples of a request is 0"),
        ([[0]], {"stop": [""]}, "stop"),
    ],
)
def test_what_leaves_no_room_is_refused_and_nothing_is_written(prompts: Any, options: Any, message: str) -> None:
    made, params = alone(), weights(MOE)
    first = sample(made, params)
    with pytest.raises(UserError, match=message):
        made.sample(params, prompts, **{"num_samples": 2, "max_tokens": 12, "seed": 0, "sampling": HOT} | options)
    assert sample(made, params) == first  # nothing is left of the others


# ---------------------------------------------------------------- weights that pass


def pointers(params: Any) -> dict[str, set[int]]:
    """By weight, where its parts lie in memory."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path): {shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards}
        for path, x in leaves
    }


def test_weights_are_not_copied_on_the_same_mesh() -> None:
    """Eight devices that hold all of them, as in training over `data`: every part lies where it lay."""
    mesh = make_mesh(MeshConfig(data=8))
    params = jax.device_put(weights(MOE), jax.NamedSharding(mesh, jax.P()))
    made = sampler(mesh)
    engine = made._with(params)
    assert pointers(engine.params) == pointers(params)
    engine.forget()
    assert engine.params is None


def test_on_one_cpu_layers_are_views_of_their_stacks() -> None:
    """Each layer begins in the memory of the stack, if it begins where XLA can read it: at a multiple of 64 bytes."""
    params = jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), weights(MOE))
    engine = alone()._with(params)
    found = engine.params
    names, looked = ("w_q", "w_k", "w_v", "w_out"), 0
    for name in names:
        stack, layers = params["group_0"]["attention"][name], found["group_0"]["attention"][name]
        for number, layer in enumerate(layers):
            begin = stack.unsafe_buffer_pointer() + number * layer.nbytes
            assert layer.unsafe_buffer_pointer() == begin
            looked += 1
    assert looked == 2 * len(names)
    for name in ("w_gate", "w_up", "w_down"):  # experts stay stacked
        assert pointers(found["group_0"]["ffn"][name]) == pointers(params["group_0"]["ffn"][name])
    engine.forget()
    assert engine.params is None


@pytest.mark.parametrize(
    "axes", [{"tensor": 8}, *(pytest.param(a, marks=pytest.mark.slow) for a in ({"data": 8}, {"data": 2, "expert": 4}))]
)
def test_weights_of_another_mesh_are_sent(axes: dict[str, int]) -> None:
    """The trainer's are cut over eight devices by FSDP; texts and decisions are those of one device."""
    params = weights(MOE)
    expected = sample(alone(), params)
    model = nnx.eval_shape(lambda: nnx.merge(graph(MOE), params))
    trained = jax.device_put(params, shardings(params, logical_axes(model), make_mesh(MeshConfig(fsdp=8))))
    found = sample(sampler(make_mesh(MeshConfig(**({"data": 1} | axes)))), trained)
    for own, others in zip(found, expected, strict=True):
        for rollout, other in zip(own, others, strict=True):
            assert rollout.tokens == other.tokens
            np.testing.assert_allclose(rollout.log_probs, other.log_probs, atol=GAP)
            np.testing.assert_array_equal(rollout.experts, other.experts)
