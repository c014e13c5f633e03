"""Learning from pairs of texts of which one is preferred; and from the best of several.

    DPO:     loss = - log sigma( beta (d(chosen) - d(rejected)) ),   d(y) = log p(y | x) - log p_ref(y | x)
    reward:  loss = - log sigma( r(chosen) - r(rejected) )

Rafailov et al. 2023 (arXiv 2305.18290), and the model of Bradley and Terry that it begins with. A pair is one row of
two documents, each with the prompt, so that both lie on the same device and in the same micro-batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsjax.config import UserError
from dsjax.data.batch import Batch
from dsjax.data.tokenizer import Tokenizer
from dsjax.nn.masks import Leaf

CHOSEN, REJECTED = 1, 2  # documents of a row
KEYS = ("prompt", "chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two texts behind a prompt, of which the first is the better one."""

    prompt: str
    chosen: str
    rejected: str


def read_pairs(path: str | pathlib.Path) -> list[Pair]:
    """The pairs of a file of JSON lines, each an object with the texts ``prompt``, ``chosen`` and ``rejected``.

    Raises:
        UserError: names the file, and the first line that is none.
    """
    try:
        lines = pathlib.Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path} can not be read: {error.strerror or error}") from None
    pairs = [_pair(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise UserError(f"{path} has no pairs; each line is a JSON object with {', '.join(KEYS)}")
    return pairs


def _pair(line: bytes, where: str) -> Pair:
    try:
        found = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON: {str(error)[:100]}") from None
    if not isinstance(found, dict):
        raise UserError(f"{where} is a {type(found).__name__}; a pair is a JSON object with {', '.join(KEYS)}")
    for key in KEYS:
        if not isinstance(found.get(key), str):
            what = f"{key} is a {type(found[key]).__name__}" if key in found else f"there is no {key}"
            raise UserError(f"{where}: {what}; it must be a text")
        try:
            found[key].encode()
        except UnicodeEncodeError:  # JSON may spell half of a surrogate pair, which no UTF-8 text can hold
            raise UserError(f"{where}: {key} holds half of a surrogate pair, which is no text") from None
    if found["chosen"] == found["rejected"]:
        raise UserError(f"{where}: chosen and rejected are the same text; one of a pair must be the better one")
    return Pair(*(found[key] for key in KEYS))


def split_pairs(pairs: Sequence[Pair], held_out_share: float) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs by a hash of the prompt, so that no prompt is on both sides.

    Where a side would be empty, the prompt nearest to the limit goes there.

    Raises:
        UserError: all pairs have the same prompt.
    """
    fraction = {p.prompt: int.from_bytes(hashlib.sha256(p.prompt.encode()).digest()[:8], "big") / 2**64 for p in pairs}
    order = sorted(fraction, key=fraction.__getitem__)
    if len(order) < 2:
        raise UserError(
            f"pairs have {len(order)} different prompts; at least 2 are needed, one of them to hold out, or a file of"
            " held-out pairs as pairs.held_out"
        )
    num = min(max(sum(x < held_out_share for x in fraction.values()), 1), len(order) - 1)
    held_out = set(order[:num])
    return [p for p in pairs if p.prompt not in held_out], [p for p in pairs if p.prompt in held_out]


# ---------------------------------------------------------------- rows


@dataclasses.dataclass(frozen=True)
class TokenPair:
    """The tokens of a pair, boundaries left out."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def token_pair(pair: Pair, tokenizer: Tokenizer) -> TokenPair:
    """A pair as the model reads it: where the prompt ends a token ends, as when a text is written behind it."""
    prompt, chosen = tokenizer.said([pair.prompt, pair.chosen])
    rejected = tokenizer.said([pair.prompt, pair.rejected])[1]
    return TokenPair(*(tuple(tokenizer.encode_said(str(x)).tolist()) for x in (prompt, chosen, rejected)))


def row_size(pair: TokenPair, *, ends: bool, turn: int = 1) -> int:
    """Positions that :func:`pair_row` puts it into."""
    chosen, rejected = (1 + len(pair.prompt) + len(text) + ends for text in (pair.chosen, pair.rejected))
    return -(-chosen // turn) * turn + rejected


def pair_row(pair: TokenPair, seq_len: int, end_id: int, *, ends: bool, turn: int = 1) -> dict[str, np.ndarray]:
    """A pair as the fields of a row of a ``Batch``, (T,) each: the chosen text is document 1, the other is 2.

    The weights of each document add up to 1/2: over its text and the end of it, or, with ``ends``, at the boundary
    behind it, which is an input then: there the text is known to be whole.

    Args:
        pair: its tokens; they fit.
        seq_len: T.
        end_id: the boundary.
        ends: whether what is wanted of a text is one number, read at its end.
        turn: the second document begins at a multiple of it: of a model that cuts rows, ``DecoderConfig.turn``.
    """
    row: dict[str, np.ndarray] = {name: np.full(seq_len, end_id, np.int32) for name in ("tokens", "targets")}
    row |= {name: np.zeros(seq_len, np.int32) for name in ("document_ids", "positions")}
    row["loss_weight"] = np.zeros(seq_len, np.float32)
    at = 0
    for document, text in ((CHOSEN, pair.chosen), (REJECTED, pair.rejected)):
        stream = np.array([end_id, *pair.prompt, *text, end_id, end_id], np.int32)
        size = len(stream) - (1 if ends else 2)
        here = slice(at, at + size)
        row["tokens"][here], row["targets"][here] = stream[:size], stream[1 : size + 1]
        row["document_ids"][here], row["positions"][here] = document, np.arange(size)
        counted = 1 if ends else len(text) + 1
        row["loss_weight"][at + size - counted : at + size] = 0.5 / counted
        at += -(-size // turn) * turn
    return row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairBatch(Batch):
    """Rows of pairs, and what the policy that training began with says of their texts.

    reference_B2: float32, log-probabilities of the chosen and of the rejected text, in nats.
    """

    reference_B2: Leaf = None


# ---------------------------------------------------------------- losses


def of_pairs(score_BT: Float[Array, "B T"], batch: Batch) -> Float[Array, "B 2"]:
    """The sum of what is said of each position that counts, for the chosen and for the rejected text."""
    counts_BT = batch.loss_weight_BT > 0
    ids_BT = batch.documents.ids_BT
    sums = [jnp.sum(jnp.where(counts_BT & (ids_BT == i), score_BT, 0), axis=1) for i in (CHOSEN, REJECTED)]
    return jnp.stack(sums, axis=1)


def lengths_of_pairs(batch: Batch) -> Int[Array, "B 2"]:
    """Tokens that count of the chosen and of the rejected text; at least 1."""
    counts_BT, ids_BT = batch.loss_weight_BT > 0, batch.documents.ids_BT
    return jnp.stack([jnp.maximum(jnp.sum(counts_BT & (ids_BT == i), axis=1), 1) for i in (CHOSEN, REJECTED)], axis=1)


def implicit_rewards(
    log_prob_B2: Float[Array, "B 2"],
    reference_B2: Float[Array, "B 2"],
    length_B2: Int[Array, "B 2"],
    *,
    beta: float,
    per_token: bool = False,
) -> Float[Array, "B 2"]:
    """beta (log p - log p_ref) of each text: the reward under which the policy is the best one (DPO).

    With ``per_token`` over its length, so that long texts weigh no more (Lambert et al. 2024, arXiv 2411.15124).
    """
    return beta * (log_prob_B2 - reference_B2) / (length_B2 if per_token else 1)


def pair_losses(reward_B2: Float[Array, "B 2"], *, label_smoothing: float = 0.0) -> Float[Array, " B"]:
    """- log sigma(margin) of each pair, where one label in 1 / ``label_smoothing`` may be the wrong way round."""
    margin_B = reward_B2[:, 0] - reward_B2[:, 1]
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin_B) - label_smoothing * jax.nn.log_sigmoid(-margin_B)


def pair_figures(reward_B2: Float[Array, "B 2"]) -> dict[str, Float[Array, " B"]]:
    """Of each pair: whether the chosen text has more (half, if they have the same), by how much, and what both have."""
    chosen_B, rejected_B = reward_B2[:, 0], reward_B2[:, 1]
    accuracy_B = (chosen_B > rejected_B) + 0.5 * (chosen_B == rejected_B)
    return {"accuracy": accuracy_B, "margin": chosen_B - rejected_B, "chosen": chosen_B, "rejected": rejected_B}


# ---------------------------------------------------------------- the best of several


def best_of(
    rewards: Sequence[Sequence[float | None]], lengths: Sequence[Sequence[int]], *, least: float = -math.inf
) -> list[int | None]:
    """Which text of each prompt has the highest reward: of equal ones the shortest, of those the first.

    For fine-tuning on the best of n (rejection sampling). Rewards that are None or NaN are unknown.

    Args:
        rewards: of each prompt's texts.
        lengths: their numbers of tokens.
        least: what a text must have; None is the answer where none has.
    """
    found = list[int | None]()
    for own, sizes in zip(rewards, lengths, strict=True):
        known = [
            (-reward, size, place)
            for place, (reward, size) in enumerate(zip(own, sizes, strict=True))
            if reward is not None and reward >= least  # NaN is not
        ]
        found.append(min(known)[2] if known else None)
    return found


def best_and_worst(
    rewards: Sequence[Sequence[float | None]], lengths: Sequence[Sequence[int]], *, least: float = -math.inf
) -> list[tuple[int, int] | None]:
    """The best text of each prompt as :func:`best_of` picks it, and the one with the lowest reward, likewise.

    None is the answer where no text has ``least``, or all have the same reward: there is nothing to prefer.
    """
    turned = [[None if reward is None else -reward for reward in own] for own in rewards]
    best, worst = best_of(rewards, lengths, least=least), best_of(turned, lengths)
    return [
        (i, j) if i is not None and j is not None and own[i] != own[j] else None
        for i, j, own in zip(best, worst, rewards, strict=True)
    ]
