"""The features of a corpus: computed once, and kept beside its tokens in the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int64

from dsjax import manifest
from dsjax.config import UserError
from dsjax.data.prepare import Corpus, DataConfig, build_entry, load_entry, open_tokens, prepare
from dsjax.data.structure.language import LANGUAGES
from dsjax.data.structure.layout_scanner import LayoutScanner
from dsjax.data.structure.repair import with_repairs
from dsjax.data.structure.scanner import Scanner
from dsjax.data.structure.vocabulary import Vocabulary
from dsjax.data.token_file import write_parts
from dsjax.data.tokenizer import Tokenizer
from dsjax.nn.fields import NUM_FIELDS
from dsjax.nn.structure import StructureConfig

# Raise when the same tokens give other features: old caches are then left alone, and old runs refuse to go on.
_FEATURES_VERSION = 1
_DTYPE = "<i2"


def scanner(language: str, tokenizer: Tokenizer) -> Scanner:
    """A scanner at the beginning of a text, for the tokens of a tokenizer."""
    if tokenizer.layout:
        return LayoutScanner(LANGUAGES[language], tokenizer)
    return Scanner(LANGUAGES[language], Vocabulary.of(tokenizer))


def prepared(
    cfg: DataConfig,
    structure: StructureConfig | None,
    cache_dir: str | pathlib.Path,
    *,
    progress: Callable[[str], None] | None = None,
) -> Corpus:
    """All that a model is trained on and judged by: what :func:`dsjax.data.prepare.prepare` returns, and beside it
    repairs and features, if the one config or the other asks for them.

    Raises:
        UserError: see there, :func:`dsjax.data.structure.repair.with_repairs` and :func:`with_structure`.
    """
    corpus = prepare(cfg, cache_dir, progress=progress)
    if cfg.repair is not None:
        corpus = with_repairs(corpus, cfg.repair, cfg.seed, cache_dir, progress=progress)
    if structure is not None:
        corpus = with_structure(corpus, structure.language, cache_dir, progress=progress)
    return corpus


def with_structure(
    corpus: Corpus, language: str, cache_dir: str | pathlib.Path, *, progress: Callable[[str], None] | None = None
) -> Corpus:
    """The corpus with the features of its tokens, from the cache when they were computed before.

    Args:
        corpus: what was prepared.
        language: that its documents are read as.
        cache_dir: where corpora are kept.
        progress: called with one line if they are computed.

    Raises:
        UserError: the cache can not be written.
    """
    settings = ("features", _FEATURES_VERSION, language, corpus.content)
    key = hashlib.sha256(repr(settings).encode()).hexdigest()
    folder = pathlib.Path(cache_dir) / key[:32]
    try:
        found = load_entry(folder, lambda folder: _read(folder, corpus))
        if found is None:
            if progress is not None:
                progress(f"reading the structure of the documents as {language}")
            build_entry(folder, lambda building: _build(building, corpus, language))
            found = load_entry(folder, lambda folder: _read(folder, corpus))
        if found is None:
            raise OSError("what was just written cannot be read back")
    except OSError as error:
        raise UserError(f"data cache {folder} can not be written: {error.strerror or error}") from error
    fingerprint = hashlib.sha256(repr((corpus.fingerprint, settings)).encode()).hexdigest()
    return dataclasses.replace(found, fingerprint=fingerprint)


def _build(folder: pathlib.Path, corpus: Corpus, language: str) -> None:
    first = scanner(language, corpus.tokenizer)
    for number, store in enumerate(corpus.stores):
        _write(folder, str(number), _scanned(first, store.tokens, store.offsets))
    held_out = [document.ids for document in corpus.held_out]
    ends = np.cumsum([0, *(ids.size for ids in held_out)], dtype=np.int64)
    _write(folder, "held_out", _scanned(first, np.concatenate(held_out), ends))
    manifest.write(folder, {"language": language}, manifest.inventory(folder, manifest.files_of(folder)))


def _scanned(first: Scanner, tokens: Any, offsets: Int64[np.ndarray, " bounds"]) -> Iterator[np.ndarray]:
    for begin, end in itertools.pairwise(offsets):
        yield first.copy().scan(tokens[begin:end]).astype(_DTYPE)


def _write(folder: pathlib.Path, name: str, parts: Iterator[np.ndarray]) -> None:
    (folder / f"checks_{name}").write_bytes(write_parts(folder / f"features_{name}", parts))


def _read(folder: pathlib.Path, corpus: Corpus) -> Corpus:
    files = manifest.read(folder)["files"]
    # Feature files have checks of their own, as token files.
    others = [name for name in files if not name.startswith("features_")]
    for name, found in manifest.inventory(folder, others).items():
        if found != files[name]:
            raise manifest.Damaged(f"{name} fails its checksum")

    def features(name: str, num_tokens: int) -> Any:
        stored = open_tokens(folder, f"features_{name}", f"checks_{name}", files, _DTYPE)
        if stored.size != num_tokens * NUM_FIELDS:
            raise manifest.Damaged(f"features_{name} does not fit its tokens")
        return stored

    stores = tuple(
        dataclasses.replace(store, features=features(str(number), int(store.tokens.size)))
        for number, store in enumerate(corpus.stores)
    )
    sizes = [document.ids.size for document in corpus.held_out]
    held_out = np.asarray(features("held_out", sum(sizes))).reshape(-1, NUM_FIELDS)
    parts = np.split(held_out, np.cumsum(sizes)[:-1])
    documents = tuple(
        dataclasses.replace(document, features_TC=part) for document, part in zip(corpus.held_out, parts, strict=True)
    )
    return dataclasses.replace(corpus, stores=stores, held_out=documents)
