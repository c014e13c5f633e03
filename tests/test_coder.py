"""A decoder that is told the structure around its tokens: no effect at first, causal, behind a cache, on any mesh."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from models import DENSE, EVERYTHING, V, graph, random_tokens, weights
from structure_cases import BYTES

from dsjax.config import UserError, apply_overrides, validate
from dsjax.data.batch import Batch
from dsjax.data.pipeline import within_row
from dsjax.data.prepare import DataConfig
from dsjax.data.structure.language import LANGUAGES, PYTHON
from dsjax.data.structure.scanner import Scanner
from dsjax.data.structure.vocabulary import Vocabulary
from dsjax.infer.engine import complete
from dsjax.infer.sampling import SamplingConfig
from dsjax.models.decoder import Decoder, DecoderConfig
from dsjax.nn.fields import CATEGORIES, COLUMN, FLOOR, LEAVES, NUM_FIELDS, POINTERS
from dsjax.nn.history import history_of, last_same
from dsjax.nn.masks import Documents
from dsjax.nn.structure import LEVELS, NEVER, Scopes, StructureConfig, with_new_scopes
from dsjax.sharding import MeshConfig
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import Pretrain, TrainConfig, build, place_batch
from dsjax.train.step import next_token_loss
from pallas_kernels.causal_attention import Tiles, causal_attention_reference, causal_attention_xla

T = 16
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 through three layers; sums are made in another order
EVERY = StructureConfig(pointers=("block", "bracket", "name"), next_leaf=0.2)


def with_scope_heads(cfg: DecoderConfig, num: int, window: int | None = None) -> DecoderConfig:
    (group,) = cfg.groups
    attention = dataclasses.replace(group.attention, scope_heads=num, window=window)  # type: ignore[type-var]
    return dataclasses.replace(cfg, groups=(dataclasses.replace(group, attention=attention),))


INPUTS = dataclasses.replace(DENSE, structure=EVERY)
SCOPED = with_scope_heads(INPUTS, 1)  # of two key/value heads
WINDOWED = with_scope_heads(INPUTS, 1, window=5)
CONFIGS = {"inputs": INPUTS, "scoped": SCOPED, "windowed": WINDOWED}


def random_features(B: int, length: int, seed: int = 0) -> np.ndarray:
    """Features as a scanner might give them, of one document a row: something ends, and all pointers point back."""
    rng = np.random.default_rng(seed)
    out = np.zeros((B, length, NUM_FIELDS), np.int16)
    for name, size in CATEGORIES.items():
        out[..., COLUMN[name]] = rng.integers(0, size, (B, length))
    out[..., COLUMN["depth"]] = rng.integers(0, 4, (B, length))
    out[..., FLOOR] = np.where(rng.random((B, length)) < 0.3, rng.integers(0, 8, (B, length)), 0)
    for column in POINTERS.values():
        out[..., column] = rng.integers(0, np.arange(length) + 1, (B, length))
    return out


@functools.cache
def _logits(cfg: DecoderConfig) -> Any:
    definition = graph(cfg)

    @jax.jit
    def run(params, tokens, features, documents):
        model = nnx.merge(definition, params)
        return model.logits(model(tokens, documents, features_BTC=features))

    return run


def logits(cfg: DecoderConfig, params: Any, tokens: Any, features: Any, documents: Any = None) -> np.ndarray:
    features = None if features is None else jnp.asarray(features)
    return np.asarray(_logits(cfg)(params, jnp.asarray(tokens), features, documents))


# ---------------------------------------------------------------- the start


@pytest.mark.parametrize("plain", [DENSE, pytest.param(EVERYTHING, marks=pytest.mark.slow)], ids=["dense", "every"])
def test_a_new_model_says_bit_for_bit_what_the_plain_one_says(plain: DecoderConfig) -> None:
    tokens, features = jnp.asarray(random_tokens(2, T)), jnp.asarray(random_features(2, T))
    structured = dataclasses.replace(plain, structure=dataclasses.replace(EVERY, pointers=(*EVERY.pointers, "same")))

    def says(cfg: DecoderConfig, features: Any) -> np.ndarray:
        params = jax.jit(lambda: nnx.to_pure_dict(nnx.split(Decoder(cfg, rngs=nnx.Rngs(3)))[1]))()
        return logits(cfg, params, tokens, features)

    assert (says(structured, features) == says(plain, None)).all()


def test_every_part_learns_from_the_first_step() -> None:
    tokens, features = jnp.asarray(random_tokens(2, T)), jnp.asarray(random_features(2, T))
    state = nnx.to_pure_dict(nnx.split(Decoder(SCOPED, rngs=nnx.Rngs(0)))[1])
    batch = Batch(tokens, jnp.roll(tokens, -1, 1), jnp.ones((2, T)), Documents.single(tokens), features)

    def loss(params: Any) -> Any:
        return next_token_loss(nnx.merge(graph(SCOPED), params), batch, jax.random.key(0), jnp.float32(2 * T))[0]

    gradients = jax.jit(jax.grad(loss))(state)["structure"]
    assert set(gradients) == {"table", "w_block", "w_bracket", "w_name", "w_leaf"}
    assert all(np.abs(g).max() > 1e-6 for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    "structure",
    [EVERY, StructureConfig(), StructureConfig(embed=False, pointers=("name",)), StructureConfig(embed=False)],
)
def test_it_counts_its_parameters(structure: StructureConfig) -> None:
    cfg = dataclasses.replace(EVERYTHING, structure=structure)
    model = nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))
    assert cfg.num_params() == sum(x.size for x in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param))))


# ---------------------------------------------------------------- causality and packing


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_and_its_features_change_nothing_before_them(name: str) -> None:
    cfg, params = CONFIGS[name], weights(CONFIGS[name])
    tokens, features, other = random_tokens(1, T), random_features(1, T), random_features(1, T, seed=1)
    base = logits(cfg, params, tokens, features)
    for t in range(T):
        tokens_t, features_t = tokens.copy(), features.copy()
        tokens_t[0, t], features_t[0, t] = V - 1, other[0, t]
        changed = logits(cfg, params, tokens_t, features_t)
        np.testing.assert_allclose(changed[:, :t], base[:, :t], **CLOSE)
        assert np.abs(changed[0, t] - base[0, t]).max() > 1e-3


@pytest.mark.parametrize("name", ["inputs", "windowed"])
@pytest.mark.parametrize("lengths", [(5, 9), (1, 5, 2, 5)])
def test_packed_documents_are_as_if_alone(name: str, lengths: tuple[int, ...]) -> None:
    cfg, params, tokens = CONFIGS[name], weights(CONFIGS[name]), random_tokens(1, T)
    parts = [random_features(1, n, seed=n) for n in lengths]
    pad = T - sum(lengths)
    ids = np.pad(np.repeat(np.arange(1, len(lengths) + 1), lengths)[None], ((0, 0), (0, pad)))
    positions = np.pad(np.concatenate([np.arange(n) for n in lengths])[None], ((0, 0), (0, pad)))
    documents = Documents(jnp.asarray(ids, jnp.int32), jnp.asarray(positions, jnp.int32))
    features = np.concatenate([*parts, random_features(1, pad, seed=9)], axis=1)
    packed, start = logits(cfg, params, tokens, features, documents), 0
    for n, part in zip(lengths, parts, strict=True):
        alone = logits(cfg, params, tokens[:, start : start + n], part)
        np.testing.assert_allclose(packed[:, start : start + n], alone, **CLOSE)
        start += n


def test_what_points_in_front_of_a_row_points_nowhere() -> None:
    features = random_features(1, T)[0]
    far = features.copy()
    far[5:, POINTERS["name"]] += T
    cut = within_row(far, np.arange(T, dtype=np.int32))
    assert (cut[5:, POINTERS["name"]] == 0).all()
    assert (np.delete(cut, POINTERS["name"], 1) == np.delete(features, POINTERS["name"], 1)).all()
    params, tokens = weights(INPUTS), random_tokens(1, T)
    # The model itself looks at nothing there either.
    np.testing.assert_array_equal(logits(INPUTS, params, tokens, far[None]), logits(INPUTS, params, tokens, cut[None]))


def test_where_the_same_token_stood_last_by_hand() -> None:
    documents = Documents(jnp.asarray([[1, 1, 1, 1, 2, 2, 2]]), jnp.asarray([[0, 1, 2, 3, 0, 1, 2]]))
    history, _ = history_of(jnp.asarray([[5, 1, 5, 5, 5, 1, 5]]), documents, None)
    assert last_same(history).tolist() == [[0, 0, 2, 1, 0, 0, 2]]


def test_languages_of_configs_are_those_that_there_are() -> None:
    assert set(get_args(get_type_hints(StructureConfig)["language"])) == set(LANGUAGES)


# ---------------------------------------------------------------- behind a cache


@pytest.mark.parametrize(
    ("name", "cuts"),
    [("inputs", (3, 4, 9)), ("scoped", (9, 1, 1, 1, 1, 1, 1, 1)), ("windowed", (3, 4, 9)), ("windowed", (16,))],
)
def test_prefill_and_decode_are_the_full_forward(name: str, cuts: tuple[int, ...]) -> None:
    cfg, params = CONFIGS[name], weights(CONFIGS[name])
    tokens, features = random_tokens(2, T), random_features(2, T)
    model = nnx.merge(graph(cfg), params)
    for empty in (False, True):

        @functools.partial(jax.jit, static_argnames="first")
        def step(model, tokens, features, cache, first):
            out = model(tokens, features_BTC=features, cache=cache, cache_is_empty=first)
            return model.logits(out), out.cache

        cache, parts, start = model.empty_cache(2, T + 4), [], 0
        for n in cuts:
            now = slice(start, start + n)
            first = empty and start == 0
            part, cache = step(model, jnp.asarray(tokens[:, now]), jnp.asarray(features[:, now]), cache, first=first)
            parts.append(part)
            start += n
        np.testing.assert_allclose(np.concatenate(parts, axis=1), logits(cfg, params, tokens, features), **CLOSE)


@pytest.mark.parametrize("compute", [{"unroll": True, "remat": "full"}])
def test_how_it_is_computed_changes_no_gradient(compute: dict) -> None:
    params, tokens = weights(SCOPED), jnp.asarray(random_tokens(2, T))
    features = jnp.asarray(random_features(2, T))

    def gradients(definition: Any) -> Any:
        def loss(params: Any) -> Any:
            model = nnx.merge(definition, params)
            return jnp.mean(jax.nn.logsumexp(model.logits(model(tokens, features_BTC=features)), axis=-1) ** 2)

        return jax.jit(jax.grad(loss))(params)

    want, got = gradients(graph(SCOPED)), gradients(graph(SCOPED, **compute))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-6), got, want)


# ---------------------------------------------------------------- heads that see what is still open


NEW_SCOPES = jax.jit(with_new_scopes)


def closes_by_hand(features_TC: np.ndarray) -> list[int]:
    """For each position the first one behind it at which something at least as shallow as what it stands in ends."""
    level = 2 * features_TC[:, COLUMN["depth"]] + (features_TC[:, COLUMN["brackets"]] > 0)
    floor = features_TC[:, FLOOR] - 1
    length = len(features_TC)
    return [next((k for k in range(j + 1, length) if 0 <= floor[k] < level[j]), NEVER) for j in range(length)]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.sampled_from((0, 5, T)))
def test_what_closes_when_is_as_by_hand_at_once_and_in_parts(seed: int, cut: int) -> None:
    features = random_features(2, T, seed)
    scopes, lengths = Scopes.none(2, T), jnp.zeros(2, jnp.int32)
    for begin, end in ((0, cut), (cut, T)):
        if end > begin:
            ids = jnp.ones((2, end - begin), jnp.int32)
            scopes = NEW_SCOPES(scopes, jnp.asarray(features[:, begin:end]), ids, lengths + begin)
    assert np.asarray(scopes.closes_BS).tolist() == [closes_by_hand(row) for row in features]
    assert np.asarray(scopes.levels_BS).max() < LEVELS


def test_a_finished_body_is_not_seen_and_headers_and_the_own_statement_are() -> None:
    text = b"def f(a):\n  b(1)\n  c\nd(x)\ne"
    features = Scanner(PYTHON, BYTES).scan(text)
    scopes = NEW_SCOPES(
        Scopes.none(1, len(text)),
        jnp.asarray(features[None]),
        jnp.ones((1, len(text)), jnp.int32),
        jnp.zeros(1, jnp.int32),
    )
    closes = np.asarray(scopes.closes_BS)[0]

    def seen(at: int) -> bytes:
        return bytes(c for j, c in enumerate(text[: at + 1]) if at < closes[j])

    # Signs are bytes here, and a bracket's opener counts as what is in it.
    assert seen(text.index(b"c")) == b"def f(a):\n  b)\n  c"  # not what the finished call has in its brackets
    assert seen(text.index(b"x")) == b"def f):\n \nd(x"  # neither the body nor the parameters
    assert seen(len(text) - 1) == b"def f):\n \nd)\ne"


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("length", "tiles"), [(1, Tiles()), (7, Tiles(4, 8)), (33, Tiles(8, 3)), (40, Tiles(8, 1))])
def test_blocked_attention_to_what_is_open_equals_the_reference(length: int, tiles: Tiles, window: int | None) -> None:
    rng = np.random.default_rng(length)
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, n, 8)), jnp.float32) for n in (4, 2, 2))
    dout = jnp.asarray(rng.normal(size=(2, length, 4, 8)), jnp.float32)
    ids = jnp.asarray(np.cumsum(rng.random((2, length)) < 0.15, axis=1) + 1, jnp.int32)
    closes = np.arange(length)[None, :, None] + rng.integers(1, 12, (2, length, 2))
    closes[..., 1] = NEVER  # one head sees all
    closes = jnp.asarray(closes, jnp.int32)

    @jax.jit
    def both(q, k, v, dout):
        want, want_vjp = jax.vjp(lambda *x: causal_attention_reference(*x, ids, window, None, closes), q, k, v)
        got, got_vjp = jax.vjp(lambda *x: causal_attention_xla(*x, ids, window, None, tiles, closes), q, k, v)
        all_seen = causal_attention_reference(q, k, v, ids, window)
        return got, want, got_vjp(dout), want_vjp(dout), all_seen

    got, want, grads, want_grads, all_seen = both(q, k, v, dout)
    np.testing.assert_allclose(got, want, atol=2e-6)  # float32 sums of at most 40 terms near 1, in another order
    for g, w in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5)
    np.testing.assert_allclose(got[:, :, 2:], all_seen[:, :, 2:], atol=2e-6)
    assert length < 7 or np.abs(got[:, :, :2] - all_seen[:, :, :2]).max() > 0.1


# ---------------------------------------------------------------- training


def test_the_loss_of_the_next_leaf_by_hand() -> None:
    tokens, features = jnp.asarray(random_tokens(1, 6)), jnp.asarray(random_features(1, 6))
    cfg = dataclasses.replace(DENSE, structure=StructureConfig(embed=False, next_leaf=0.5))
    params = weights(cfg)
    documents = Documents(jnp.asarray([[1, 1, 1, 2, 2, 0]]), jnp.asarray([[0, 1, 2, 0, 1, 0]]))
    weight = jnp.asarray([[1.0, 0.0, 1.0, 1.0, 1.0, 0.0]])
    batch = Batch(tokens, jnp.roll(tokens, -1, 1), weight, documents, features)

    @jax.jit
    def both(params: Any) -> tuple[Any, Any]:
        model = nnx.merge(graph(cfg), params)
        _, report = next_token_loss(model, batch, jax.random.key(0), jnp.float32(4))
        scores = model(tokens, documents, features_BTC=features).hidden_BTD @ params["structure"]["w_leaf"]
        return report, jax.nn.log_softmax(scores, axis=-1)

    report, scores = both(params)
    log_p = np.asarray(scores)[0]
    leaf = np.asarray(features)[0, :, COLUMN["leaf"]]
    # Positions 0 and 3 count: 1 has no weight, and behind 2, 4 and 5 another document begins, or the padding.
    want = 0.5 * -(log_p[0, leaf[1]] + log_p[3, leaf[4]]) / 4
    np.testing.assert_allclose(report.metrics["loss/next_leaf"], want, rtol=1e-5)
    assert scores.shape[-1] == len(LEAVES)


def small() -> Pretrain:
    return Pretrain(
        model=dataclasses.replace(SCOPED, vocab_size=V, d_model=16),
        data=DataConfig(vocab_size=300, seq_len=T, batch_size=8),
        optim=OptimConfig(lr=3e-3, warmup_steps=3),
        train=TrainConfig(steps=6),
    )


def random_batch(config: Pretrain, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    B = config.data.batch_size
    tokens = rng.integers(0, 20, (B, T + 1)).astype(np.int32)
    starts = rng.random((B, T)) < 0.1
    starts[:, 0] = True
    ids = np.cumsum(starts, axis=1).astype(np.int32)
    positions = (np.arange(T) - np.maximum.accumulate(np.where(starts, np.arange(T), 0), axis=1)).astype(np.int32)
    features = np.stack([within_row(f, p) for f, p in zip(random_features(B, T, seed), positions, strict=True)])
    weight = (rng.random((B, T)) < 0.9).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weight, Documents(ids, positions), features)


def losses(config: Pretrain, devices: Any = None) -> np.ndarray:
    model = dataclasses.replace(config.model, vocab_size=320)
    config = dataclasses.replace(config, model=model)
    validate(config)
    if devices is not None:
        config = dataclasses.replace(config, mesh=MeshConfig(data=1))
    mesh, trainer = build(config, devices)
    state, out = trainer.init(0), []
    for i in range(4):
        state, metrics = trainer.step(state, place_batch(random_batch(config, i), mesh), jnp.int32(6))
        out.append([float(metrics["loss"]), float(metrics["loss/next_leaf"])])
    return np.array(out)


@pytest.fixture(scope="module")
def one_device() -> np.ndarray:
    return losses(small(), jax.devices()[:1])


SLOW = [
    pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("data=8", "fsdp=2,tensor=2", "fsdp=2,expert=2,context=2")
]


@pytest.mark.parametrize("mesh", ["context=2,tensor=2", *SLOW])
def test_every_mesh_gives_the_losses_of_one_device(mesh: str, one_device: np.ndarray) -> None:
    found = losses(apply_overrides(small(), [f"mesh={mesh}"]))
    np.testing.assert_allclose(found, one_device, rtol=1e-5)  # float32 sums in another order


def test_micro_batches_give_the_losses_of_one(one_device: np.ndarray) -> None:
    found = losses(apply_overrides(small(), ["train.accumulate=2"]), jax.devices()[:1])
    np.testing.assert_allclose(found, one_device, rtol=1e-5)


# ---------------------------------------------------------------- generation

TEXTS = [
    b"",
    b"(",
    b")",
    b"x",
    b" = ",
    b":\n  ",
    b"\n",
    b"if ",
    b", ",
    b"'",
    b"f(",
    b"]",
    b"{",
    *[b"y"] * 19,
]


def test_generation_is_naive_decoding_with_the_features_of_what_was_generated() -> None:
    first = Scanner(PYTHON, Vocabulary(TEXTS))
    params, prompts = weights(SCOPED), [[7, 3, 5, 10], [3, 4], [0, 7, 10, 3, 2, 5, 3]]

    def naive(prompt: list[int], n: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(n):
            padded = tokens + [0] * (T - len(tokens))  # what comes behind changes nothing before
            features = first.copy().scan(padded)[None]
            tokens.append(int(logits(SCOPED, params, np.array([padded]), features)[0, len(tokens) - 1].argmax()))
        new = tokens[len(prompt) :]
        return new[: new.index(31)] if 31 in new else new

    got = complete(
        graph(SCOPED),
        params,
        prompts,
        max_tokens=6,
        end_id=31,
        max_length=64,
        sampling=SamplingConfig(temperature=0.0),
        scanners=[first] * 3,
    )
    assert got == [naive(prompt, 6) for prompt in prompts]


# ---------------------------------------------------------------- mistakes


def test_features_are_wanted_where_there_is_structure_and_only_there() -> None:
    tokens, features = jnp.asarray(random_tokens(1, 4)), jnp.asarray(random_features(1, 4))
    with pytest.raises(UserError, match="a model with structure is run with the features"):
        logits(INPUTS, weights(INPUTS), tokens, None)
    with pytest.raises(UserError, match="a model with structure is run with the features"):
        logits(DENSE, weights(DENSE), tokens, features)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"structure": StructureConfig(pointers=("name", "name"))}, "structure.pointers is .*; each can be there once"),
        ({"structure": None}, r"groups: a group has attention.scope_heads; it needs structure"),
    ],
)
def test_wrong_configs_are_told(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(dataclasses.replace(SCOPED, **change))


def test_more_scope_heads_than_heads_are_told() -> None:
    with pytest.raises(UserError, match=r"groups.0.attention.scope_heads is 3; it must be at most num_kv_heads, 2"):
        validate(with_scope_heads(INPUTS, 3))
