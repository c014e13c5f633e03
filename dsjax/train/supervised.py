"""Supervised fine-tuning on solutions of exercises: the warm start of RL, and its control.

A document is a prompt, which is read, and a solution, which is learned. The run is one of next tokens like any other;
only its documents are made here.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from dsjax.data.prepare import Corpus, CorpusReport, HeldOut, TokenStore
from dsjax.data.structure.stored import scanner
from dsjax.data.tokenizer import Tokenizer
from dsjax.nn.fields import NUM_FIELDS
from dsjax.nn.structure import StructureConfig
from dsjax.rl.exercises.exercise import Exercise
from dsjax.train.curriculum import CourseConfig, CourseRows
from dsjax.train.pretrain import Pretrain, Regime, next_token_parts

ONE_STAGE = CourseConfig(order=0.0)


def supervised(
    tokenizer: Tokenizer,
    training: Sequence[Exercise],
    held_out: Sequence[Exercise],
    *,
    learned_tokens: int | None = None,
) -> Regime:
    """The regime of a run that learns the solutions of ``training``, and is evaluated on those of ``held_out``.

    With ``learned_tokens`` it ends when about so many were learned, and behind one step at the least, whatever
    ``train.steps`` says.
    """
    found = functools.partial(material, tokenizer, training, held_out, learned_tokens)
    return Regime(found, next_token_parts)


def material(
    tokenizer: Tokenizer,
    training: Sequence[Exercise],
    held_out: Sequence[Exercise],
    learned_tokens: int | None,
    config: Pretrain,
    say: Callable[[str], None],
) -> tuple[Pretrain, Corpus, CourseRows]:
    """The exercises as a corpus, and its rows: whole documents, in an order drawn anew in each epoch."""
    del say
    corpus = with_features(exercise_corpus(tokenizer, training, held_out), config.model.structure)
    data, store = config.data, corpus.stores[0]
    rows = CourseRows(corpus, ONE_STAGE, seq_len=data.seq_len, batch_size=data.batch_size, seed=data.seed)
    if learned_tokens is not None:
        of_step = (int(np.asarray(store.weights).sum()) + store.offsets.size - 1) / rows.num_rows * data.batch_size
        steps = max(round(learned_tokens / of_step), 1)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    return config, corpus, rows


def exercise_corpus(tokenizer: Tokenizer, training: Sequence[Exercise], held_out: Sequence[Exercise] = ()) -> Corpus:
    """Documents of a prompt and a solution each.

    Args:
        tokenizer: prompt and solution are tokens of their own, as when a model writes behind a prompt.
        training: what is learned; those without a solution are left out.
        held_out: what is only evaluated.
    """
    parts, sizes = list[tuple[np.ndarray, int]](), list[int]()
    for exercise in training:
        if exercise.solution:
            said = tokenizer.said([exercise.prompt, exercise.solution])
            prompt, solution = (tokenizer.encode_said(str(form)) for form in said)
            parts += [(prompt, 0), (solution, 1)]
            sizes.append(prompt.size + solution.size)
    nothing = np.zeros(0, np.int32)
    tokens = np.concatenate([nothing, *(ids for ids, _ in parts)])
    weights = np.concatenate([nothing, *(np.full(ids.size, learned) for ids, learned in parts)]).astype(np.uint8)
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    unseen = [(exercise.key, exercise.prompt + exercise.solution) for exercise in held_out if exercise.solution]
    documents = tuple(HeldOut(name, text, tokenizer.encode(text)) for name, text in unseen)
    digest = hashlib.sha256(tokenizer.to_json().encode())
    for array in (tokens, weights, offsets):
        digest.update(array.tobytes())
    report = CorpusReport(
        num_read=len(training) + len(held_out),
        bytes_read=0,
        skipped=(),
        duplicates=(),
        num_training=len(sizes),
        training_bytes=sum(len((e.prompt + e.solution).encode()) for e in training if e.solution),
        training_tokens=int(tokens.size),
        num_held_out=len(documents),
        held_out_bytes=sum(document.num_bytes for document in documents),
        held_out_tokens=sum(document.ids.size for document in documents),
        vocab_size=tokenizer.vocab_size,
    )
    store = TokenStore(tokens, offsets, weights=weights)
    return Corpus((store,), documents, tokenizer, digest.hexdigest(), report, content=digest.hexdigest())


def with_features(corpus: Corpus, structure: StructureConfig | None) -> Corpus:
    """The corpus of some exercises with what a model is told of their tokens, if it is told any: prompt and solution
    are one text to it, as when it writes."""
    if structure is None:
        return corpus
    (store,), at_start = corpus.stores, scanner(structure.language, corpus.tokenizer)
    found = [at_start.copy().scan(store.tokens[begin:end]) for begin, end in itertools.pairwise(store.offsets)]
    features = np.concatenate([np.zeros((0, NUM_FIELDS)), *found]).astype(np.int16).reshape(-1)
    held_out = [dataclasses.replace(d, features_TC=at_start.copy().scan(d.ids)) for d in corpus.held_out]
    return dataclasses.replace(
        corpus, stores=(dataclasses.replace(store, features=features),), held_out=tuple(held_out)
    )


def level_mix(levels: Sequence[int], num: int, decay: float) -> dict[int, int]:
    """How many exercises of each level: of each level ``decay`` times as many as of the one below; ``num`` in all."""
    share = np.array([decay**place for place in range(len(levels))])
    ends = np.rint(np.cumsum(share / share.sum()) * num).astype(int)
    return dict(zip(levels, np.diff([0, *ends]).tolist(), strict=True))
