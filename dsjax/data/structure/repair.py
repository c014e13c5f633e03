"""Repair of injected errors as data: broken code, and behind it the line that mends it.

    <|broken|> def f(x)\n    return x\n <|repair|> def f(x):\n

Only what stands behind ``<|repair|>`` is to be predicted, the end of the document included.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from dsjax import manifest
from dsjax.config import UserError, to_dict
from dsjax.data.prepare import Corpus, TokenStore, build_entry, load_entry, open_tokens
from dsjax.data.structure.errors import BROKEN, REPAIR, SHARES, Broken, RepairConfig, broken, functions
from dsjax.data.token_file import write_parts
from dsjax.data.tokenizer import Tokenizer

_REPAIR_VERSION = 1  # raise when the same documents give other rows


def with_repairs(
    corpus: Corpus,
    cfg: RepairConfig,
    seed: int,
    cache_dir: str | pathlib.Path,
    *,
    progress: Callable[[str], None] | None = None,
) -> Corpus:
    """The corpus with one source more: repairs of functions of its training documents, from the cache if made before.

    Args:
        corpus: what was prepared; its tokenizer has both special tokens.
        cfg: how many.
        seed: of the errors.
        cache_dir: where corpora are kept.
        progress: called with one line if they are made.

    Raises:
        UserError: the tokenizer lacks a token, no document is Python, or the cache can not be written.
    """
    tokenizer = corpus.tokenizer
    for name in (BROKEN, REPAIR):
        if name not in tokenizer.special_ids:
            raise UserError(f"data.repair needs the special token {name!r}; add it to data.special_tokens")
    # How Python cuts its own text changed with 3.12.
    version = (_REPAIR_VERSION, *sys.version_info[:2])
    settings = ("repair", version, sorted(to_dict(cfg).items()), sorted(SHARES.items()), seed, corpus.content)
    content = hashlib.sha256(repr(settings).encode()).hexdigest()
    folder = pathlib.Path(cache_dir) / content[:32]
    try:
        store = load_entry(folder, _read)
        if store is None:
            if progress is not None:
                progress("putting errors into functions of the training documents")
            build_entry(folder, lambda building: _build(building, corpus, cfg, seed))
            store = load_entry(folder, _read)
        if store is None:
            raise OSError("what was just written cannot be read back")
    except OSError as error:
        raise UserError(f"data cache {folder} can not be written: {error.strerror or error}") from error
    fingerprint = hashlib.sha256(repr((corpus.fingerprint, content, cfg.share)).encode()).hexdigest()
    return dataclasses.replace(
        corpus,
        stores=(*corpus.stores, store),
        further_shares=(*corpus.further_shares, cfg.share),
        fingerprint=fingerprint,
        content=content,
    )


def repair_tokens(tokenizer: Tokenizer, case: Broken) -> tuple[list[int], int]:
    """The tokens of a repair, and how many of them stand in front of what is to be predicted."""
    parts = (tokenizer.special_ids[BROKEN], case.text, tokenizer.special_ids[REPAIR])
    given = tokenizer.encode_parts(parts)
    return [*given, *tokenizer.encode(case.original, added=False).tolist()], len(given)


def repairs(texts: Iterable[str], cfg: RepairConfig, seed: int) -> Iterator[Broken]:
    """Broken functions of some documents; those of a document depend on nothing but it and the seed."""
    for text in texts:
        digest = hashlib.sha256(text.encode()).hexdigest()
        rng = random.Random(f"{seed}/{digest}")
        found = functions(text, cfg.max_lines)
        for code in rng.sample(found, min(cfg.per_document, len(found))):
            case = broken(code, rng)
            if case is not None:
                yield case


def _build(folder: pathlib.Path, corpus: Corpus, cfg: RepairConfig, seed: int) -> None:
    texts = (
        corpus.tokenizer.decode(store.tokens[begin:end])
        for store in corpus.stores
        for begin, end in zip(store.offsets[:-1].tolist(), store.offsets[1:].tolist(), strict=True)
    )
    made = [repair_tokens(corpus.tokenizer, case) for case in repairs(texts, cfg, seed)]
    if not made:
        raise UserError("data.repair found no Python function in the training documents to put an error into")
    dtype = np.asarray(corpus.stores[0].tokens[:0]).dtype
    tokens = [np.array(ids, dtype) for ids, _ in made]
    weights = [(np.arange(len(ids)) >= given).astype(np.uint8) for ids, given in made]
    (folder / "checks_tokens").write_bytes(write_parts(folder / "tokens", tokens))
    (folder / "checks_weights").write_bytes(write_parts(folder / "weights", weights))
    offsets = np.cumsum([0, *map(len, tokens)], dtype="<i8")
    (folder / "offsets").write_bytes(offsets.tobytes())
    manifest.write(folder, {"dtype": dtype.str}, manifest.inventory(folder, manifest.files_of(folder)))


def _read(folder: pathlib.Path) -> TokenStore:
    body: dict[str, Any] = manifest.read(folder)
    files = body["files"]
    for name, found in manifest.inventory(folder, [n for n in files if n not in ("tokens", "weights")]).items():
        if found != files[name]:
            raise manifest.Damaged(f"{name} fails its checksum")
    tokens = open_tokens(folder, "tokens", "checks_tokens", files, body["dtype"])
    weights = open_tokens(folder, "weights", "checks_weights", files, "u1")
    offsets = np.frombuffer((folder / "offsets").read_bytes(), "<i8")
    if offsets[0] != 0 or offsets[-1] != tokens.size or tokens.size != weights.size or (np.diff(offsets) < 0).any():
        raise manifest.Damaged("offsets does not fit its tokens")
    return TokenStore(tokens, offsets, weights=weights)
