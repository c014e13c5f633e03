"""Sampling and generation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import EVERYTHING, V, graph, logits, weights

from dsjax.config import UserError
from dsjax.infer.engine import complete, generate
from dsjax.infer.sampling import SamplingConfig, sample

LOGITS = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))


def counts(cfg: SamplingConfig, n: int = 4000) -> np.ndarray:
    rows = jnp.broadcast_to(LOGITS, (n, 4))
    return np.bincount(np.asarray(sample(rows, jax.random.key(0), cfg)), minlength=4) / n


@pytest.mark.parametrize("temperature", [0.0, 1e-50, 1e-3])
def test_temperatures_near_zero_are_greedy(temperature: float) -> None:
    assert counts(SamplingConfig(temperature=temperature)).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("cfg", "want"),
    [
        (SamplingConfig(1.0, 0, 1.0), [0.5, 0.3, 0.15, 0.05]),
        (SamplingConfig(1.0, 2, 1.0), [0.625, 0.375, 0, 0]),
        (SamplingConfig(1.0, 0, 0.79), [0.625, 0.375, 0, 0]),  # the second token carries the sum over 0.79
        (SamplingConfig(1.0, 0, 0.0), [1, 0, 0, 0]),
        (SamplingConfig(0.5, 0, 1.0), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
    ],
)
def test_samples_follow_the_stated_distribution(cfg: SamplingConfig, want: list[float]) -> None:
    got = counts(cfg)
    # four standard deviations of a share of 4,000 draws
    np.testing.assert_allclose(got, want, atol=4 * 0.5 / np.sqrt(4000))
    assert all(g == 0 for g, w in zip(got, want, strict=True) if w == 0)


GREEDY = SamplingConfig(temperature=0.0)
GRAPH, PARAMS = graph(EVERYTHING), weights(EVERYTHING)


def naive(prompt: list[int], n: int) -> list[int]:
    """Greedy decoding by full forward passes."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(logits(EVERYTHING, PARAMS, np.array([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_generation_of_a_ragged_batch_is_naive_decoding_row_by_row() -> None:
    prompts = [[1, 2, 3], [4, 5, 4, 5, 4], [3]]
    got = complete(GRAPH, PARAMS, prompts, max_tokens=5, end_id=31, max_length=64, sampling=GREEDY, steps=2)
    want = [naive(p, 5) for p in prompts]
    want = [row[: row.index(31)] if 31 in row else row for row in want]
    assert got == want


def test_nothing_but_the_end_token_stands_behind_it() -> None:
    first = naive([1, 2, 3], 3)
    end = first[2] if first[2] not in first[:2] else first[0]
    parts = list(
        generate(GRAPH, PARAMS, [[1, 2, 3]], max_tokens=9, end_id=end, max_length=64, sampling=GREEDY, steps=4)
    )
    row = np.concatenate(parts, axis=1)[0].tolist()
    assert set(row[row.index(end) :]) == {end}
    assert len(row) <= 4 * -(-(row.index(end) + 1) // 4)  # and it stopped at the chunk in which the row ended


def test_a_seed_gives_the_same_samples_again_and_another_seed_others() -> None:
    def run(seed: int) -> list[list[int]]:
        options = {"max_tokens": 12, "end_id": 31, "max_length": 64, "sampling": SamplingConfig(1.5, 0, 1.0)}
        return complete(GRAPH, PARAMS, [[1, 2]], seed=seed, **options)

    assert run(1) == run(1) != run(2)


def test_new_tokens_stop_at_the_length_of_the_model() -> None:
    got = complete(GRAPH, PARAMS, [[1] * 10], max_tokens=50, end_id=31, max_length=14, sampling=GREEDY)
    assert len(got[0]) <= 4


@pytest.mark.parametrize(("prompts", "sentence"), [([[]], "a prompt is empty"), ([[1] * 20], "a prompt has 20 tokens")])
def test_prompts_that_cannot_be_continued_are_refused(prompts: list, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        list(generate(GRAPH, PARAMS, prompts, max_tokens=4, end_id=0, max_length=20))


def test_healing_lets_a_prompt_end_inside_a_token() -> None:
    from dsjax.data.tokenizer import train_tokenizer
    from dsjax.infer.engine import heal

    tokenizer = train_tokenizer(["if x:\n    y()\nfor i in z:\n    y()\n" * 50], 300)
    whole = tokenizer.encode("if x:\n    y").tolist()
    ids = [tokenizer.end_id, *tokenizer.encode("if x:\n").tolist()]
    assert ids[1:] != whole[: len(ids) - 1]  # ":\n    " is one token: the prompt's own cut is never seen in training
    healed, first = heal(tokenizer, ids)
    assert healed == ids[:-1]
    assert first[whole[len(healed) - 1]]
    allowed = [tokenizer.decode([i]) for i in np.flatnonzero(first).tolist()]
    assert all(text.startswith(tokenizer.decode(ids[-1:])) for text in allowed)
    assert heal(tokenizer, [tokenizer.end_id])[0] == [tokenizer.end_id]


def test_only_the_given_first_tokens_come_first() -> None:
    only = np.zeros(V, bool)
    only[[7, 9]] = True
    rows = complete(
        GRAPH, PARAMS, [[1, 2]] * 20, max_tokens=2, end_id=31, max_length=64,
        sampling=SamplingConfig(2.0, 0, 1.0), first_tokens=[only] * 20,
    )  # fmt: skip
    assert {row[0] for row in rows} == {7, 9}
