"""From sources to token arrays: read, remove duplicates, hold out, train the tokenizer, encode; cached by content."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import numpy as np
from jaxtyping import Int16, Int32, Int64, Integer, UInt8

from dsjax import manifest
from dsjax.config import Bounds, PositiveInt, Seed, Share, UserError, validate
from dsjax.data.corpus import Reading, Source, check_damage, describe_skipped, read_source
from dsjax.data.dedup import Duplicate, deduplicate
from dsjax.data.marked import Marked, encode
from dsjax.data.records import Document, Skipped
from dsjax.data.structure.errors import BROKEN, REPAIR, RepairConfig
from dsjax.data.token_file import TokenFile, write_tokens
from dsjax.data.tokenizer import (
    END,
    LAYOUT_SPLIT,
    SPLIT,
    Tokenizer,
    load_tokenizer,
    parse_tokenizer,
    refuse_names_in_text,
    train_tokenizer,
)

_log = logging.getLogger(__name__)

T = TypeVar("T")

# Raise when the same inputs give other arrays (a new split rule, another format): old caches are then left alone.
_CACHE_VERSION = 3
# Raise when the same arrays give other rows (pipeline.py): old runs then refuse to resume.
_ROWS_VERSION = 1
# Token files up to this many bytes (some seconds of SHA-256) are read through at the start, where damage can be
# mended by building the entry again; of larger ones each block is checked when it is read, as it is of these, too.
_VERIFIED_AT_START = 2**30


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how it is cut into rows.

    sources: where documents come from, with their weights in the mixture.
    vocab_size: ids of the tokenizer to train; an upper bound for one that is loaded.
    tokenizer_path: a tokenizer.json to use instead of training one.
    end_token: name of the document boundary, in either.
    special_tokens: further special tokens of a trained tokenizer.
    held_out_share: expected share of documents held out, chosen by content hash.
    near_duplicate_threshold: Jaccard similarity from which one of two documents is dropped; 1 drops exact copies only.
    max_damaged_share: share of the records found that may be damaged; more of them stop the run.
    seq_len: tokens in a row.
    batch_size: rows in a step, over all hosts.
    seed: of every shuffle.
    repair: rows of broken code and what mends it, or none (:mod:`dsjax.data.structure.repair`).
    layout: tokens say how Python is indented relative to the line before (:mod:`dsjax.data.layout`). With
        tokenizer_path the file decides.
    """

    sources: tuple[Source, ...] = (Source(),)
    vocab_size: PositiveInt = 4096
    tokenizer_path: str = ""
    end_token: str = END
    special_tokens: tuple[str, ...] = ()
    held_out_share: Annotated[float, Bounds(gt=0, lt=1)] = 0.05
    near_duplicate_threshold: Annotated[float, Bounds(gt=0, le=1)] = 0.7
    max_damaged_share: Share = 0.001
    seq_len: PositiveInt = 256
    batch_size: PositiveInt = 8
    seed: Seed = 0
    repair: RepairConfig | None = None
    layout: bool = False

    def validate(self) -> None:
        """What annotations cannot say; `dsjax.config.validate` checks those and calls this.

        Raises:
            UserError: names the key, relative to this config.
        """
        if not self.sources:
            raise UserError("sources is empty; give at least one, for example Source('stdlib')")
        names = (self.end_token, *self.special_tokens)
        if not all(names) or len(set(names)) < len(names):
            raise UserError(f"special_tokens is {self.special_tokens!r}; names must be distinct and not empty")
        if any("\ud800" <= c <= "\udfff" for name in names for c in name):
            raise UserError(f"end_token and special_tokens are {names!a}; one has half of a surrogate pair")
        if not self.tokenizer_path:
            refuse_names_in_text(self.end_token, self.special_tokens)
        if self.tokenizer_path:
            if self.special_tokens:
                raise UserError(
                    f"special_tokens is {self.special_tokens!r}; with tokenizer_path the file decides, leave it empty"
                )
        elif self.vocab_size < 256 + len(names):
            raise UserError(
                f"vocab_size is {self.vocab_size}; it must be at least {256 + len(names)}:"
                f" 256 bytes and {len(names)} special token(s)"
            )
        if self.repair is not None and not self.tokenizer_path and not {BROKEN, REPAIR} <= set(self.special_tokens):
            raise UserError(f"special_tokens is {self.special_tokens!r}; with repair it has {BROKEN!r} and {REPAIR!r}")


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """The training documents of one source: document d is tokens[offsets[d] : offsets[d + 1]], without boundaries.

    features: of token after token, C numbers each (:mod:`dsjax.nn.fields`); None: there are none.
    weights: whether a token is to be predicted; None: all are.
    """

    tokens: Integer[np.ndarray, " N"] | TokenFile
    offsets: Int64[np.ndarray, " bounds"]
    features: Int16[np.ndarray, " N_C"] | TokenFile | None = None
    weights: UInt8[np.ndarray, " N"] | TokenFile | None = None


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """One held-out document, its ids without boundaries, and their features if a model is given such."""

    name: str
    text: str
    ids: Int32[np.ndarray, " T"]
    features_TC: Int16[np.ndarray, "T C"] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode())


@dataclasses.dataclass(frozen=True)
class CorpusReport:
    """Counts for people. Bytes are UTF-8; tokens exclude boundaries.

    skipped: what was found and not used, why, and where it is. duplicates: (dropped, kept in its place, similarity).
    """

    num_read: int
    bytes_read: int
    skipped: tuple[Skipped, ...]
    duplicates: tuple[tuple[str, str, float], ...]
    num_training: int
    training_bytes: int
    training_tokens: int
    num_held_out: int
    held_out_bytes: int
    held_out_tokens: int
    vocab_size: int


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Everything that training and evaluation need of the data.

    stores: the training half, one per source of the config.
    held_out: the other half; no content, and no near duplicate of one, is in both.
    fingerprint: SHA-256 that changes with any document, the tokenizer and every setting that changes the rows.
    documents: for each source, file name -> digest of what was read from it; plain data, for
        `dsjax.data.corpus.changed_documents`.
    content: SHA-256 of the documents and the tokenizer alone.
    further_shares: of the rows, one for each store that is none of the config's sources; those stand last.
    """

    stores: tuple[TokenStore, ...]
    held_out: tuple[HeldOut, ...]
    tokenizer: Tokenizer
    fingerprint: str
    report: CorpusReport
    documents: tuple[dict[str, str], ...] = ()
    content: str = ""
    further_shares: tuple[float, ...] = ()

    def training_documents(self) -> tuple[Integer[np.ndarray, " N"], Int64[np.ndarray, " bounds"]]:
        """Tokens and offsets of all training documents, source after source."""
        lengths = np.concatenate([np.diff(s.offsets) for s in self.stores])
        return np.concatenate([np.asarray(s.tokens) for s in self.stores]), _offsets(lengths)


def prepare(cfg: DataConfig, cache_dir: str | pathlib.Path, *, progress: Callable[[str], None] | None = None) -> Corpus:
    """Reads the sources and returns their tokens, from the cache when the same contents were prepared before.

    Safe to call from several processes at once with one cache_dir.

    Args:
        cfg: what to read and how.
        cache_dir: a folder, made if missing; each distinct content and setting has its own folder in it.
        progress: called with one line as each stage begins.

    Raises:
        UserError: a bad setting, path or file, too many damaged records, too few documents, a tokenizer that does not
            fit, or a cache that can not be written.
    """
    validate(cfg, "data")
    say = progress or (lambda line: None)
    say(f"reading {len(cfg.sources)} source(s)")
    readings = [read_source(source) for source in cfg.sources]
    if skipped := describe_skipped(readings):
        say(skipped)
    check_damage(readings, cfg.max_damaged_share)
    loaded = load_tokenizer(cfg.tokenizer_path, end_token=cfg.end_token) if cfg.tokenizer_path else None
    if loaded is not None and loaded.vocab_size > cfg.vocab_size:
        raise UserError(
            f"data.vocab_size is {cfg.vocab_size}; {cfg.tokenizer_path} has {loaded.vocab_size} ids, so it must be at"
            " least that"
        )
    if loaded is not None and cfg.layout and not loaded.layout:
        raise UserError(f"data.layout is true; {cfg.tokenizer_path} is a tokenizer without layout, which decides")
    folder = pathlib.Path(cache_dir) / _cache_key(cfg, readings, loaded)
    try:
        corpus = _load(folder, cfg) or _make(cfg, readings, loaded, folder, say)
    except OSError as error:
        raise UserError(f"data cache {folder} can not be written: {error.strerror or error}") from error
    return dataclasses.replace(corpus, documents=tuple(reading.digests for reading in readings))


def _cache_key(cfg: DataConfig, readings: Sequence[Reading], loaded: Tokenizer | None) -> str:
    pattern = LAYOUT_SPLIT if cfg.layout else SPLIT
    settings = (_CACHE_VERSION, pattern, cfg.vocab_size, cfg.end_token, cfg.special_tokens, cfg.held_out_share)
    digest = hashlib.sha256(repr((*settings, cfg.near_duplicate_threshold, loaded and loaded.to_json())).encode())
    for reading in readings:
        listed = [(d.name, d.digest.hex()) for d in reading.documents]
        digest.update(repr((listed, reading.skipped)).encode())
    return digest.hexdigest()[:32]


# ---------------------------------------------------------------- building


def _make(
    cfg: DataConfig,
    readings: Sequence[Reading],
    loaded: Tokenizer | None,
    folder: pathlib.Path,
    say: Callable[[str], None],
) -> Corpus:
    """Builds a cache entry beside its place, moves it there and reads it back."""
    build_entry(folder, lambda building: _build(cfg, readings, loaded, building, say))
    corpus = _load(folder, cfg)
    if corpus is None:
        raise OSError("what was just written cannot be read back")
    return corpus


def _build(
    cfg: DataConfig,
    readings: Sequence[Reading],
    loaded: Tokenizer | None,
    folder: pathlib.Path,
    say: Callable[[str], None],
) -> None:
    """Writes the files of a cache entry into an empty folder."""
    documents = [d for reading in readings for d in reading.documents]
    source_of = [number for number, reading in enumerate(readings) for _ in reading.documents]
    say(f"removing duplicates among {len(documents)} documents")
    unique = deduplicate(documents, cfg.near_duplicate_threshold)
    training, held_out = split(documents, unique.kept, cfg.held_out_share)
    for number, source in enumerate(cfg.sources):
        if all(source_of[i] != number for i in training):
            raise UserError(
                f"data.sources.{number} ({source.path!r}) has no document left to train on: all"
                f" {len(readings[number].documents)} are held out or duplicates of others"
            )

    tokenizer = loaded
    if tokenizer is None:
        say(f"training a tokenizer of {cfg.vocab_size} entries on {len(training)} documents")
        texts = (documents[i].text for i in training)
        tokenizer = train_tokenizer(
            texts, cfg.vocab_size, cfg.special_tokens, end_token=cfg.end_token, layout=cfg.layout
        )
    say(f"encoding {len(training)} training and {len(held_out)} held-out documents")
    (folder / "tokenizer.json").write_bytes(tokenizer.to_json().encode())
    groups = [[i for i in training if source_of[i] == number] for number in range(len(readings))]
    training_tokens = sum(
        _write_tokens(folder, str(number), [documents[i] for i in group], tokenizer)
        for number, group in enumerate(groups)
    )
    held = [documents[i] for i in held_out]
    held_out_tokens = _write_tokens(folder, "held_out", held, tokenizer)
    (folder / "held_out.jsonl").write_bytes(
        b"".join(json.dumps({"name": d.name, "text": d.text}).encode() + b"\n" for d in held)
    )
    _check_lossless(held, tokenizer, cfg.tokenizer_path)

    content = hashlib.sha256(tokenizer.to_json().encode())
    for group in (*groups, held_out):
        content.update(len(group).to_bytes(8, "little") + b"".join(documents[i].digest for i in group))
    report = CorpusReport(
        num_read=len(documents),
        bytes_read=sum(len(d.content) for d in documents),
        skipped=tuple(s for reading in readings for s in reading.skipped),
        duplicates=tuple(_named(documents, d) for d in unique.dropped),
        num_training=len(training),
        training_bytes=sum(len(documents[i].content) for i in training),
        training_tokens=training_tokens,
        num_held_out=len(held),
        held_out_bytes=sum(len(d.content) for d in held),
        held_out_tokens=held_out_tokens,
        vocab_size=tokenizer.vocab_size,
    )
    about = {"content": content.hexdigest(), "report": dataclasses.asdict(report)}
    manifest.write(folder, about, manifest.inventory(folder, manifest.files_of(folder)))


def split(
    documents: Sequence[Document], indices: Sequence[int], held_out_share: float
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(training, held-out) indices: a document is held out when its SHA-256, as a fraction, is below the share.

    A document's half depends on its content alone, so a corpus that grows never moves one across. Only when a half
    would be empty does the document nearest to the limit go there.

    Raises:
        UserError: fewer than two documents.
    """
    if len(indices) < 2:
        raise UserError(
            f"data.sources hold {len(indices)} distinct document(s); at least 2 are needed, one of them to hold out"
        )
    fraction = {i: int.from_bytes(documents[i].digest[:8], "big") / 2**64 for i in indices}
    limit = held_out_share
    if min(fraction.values()) >= limit:
        limit = min(fraction.values()) * (1 + 2**-52)
    held_out = tuple(i for i in indices if fraction[i] < limit)
    if len(held_out) == len(indices):
        last = max(indices, key=fraction.__getitem__)
        held_out = tuple(i for i in held_out if i != last)
    training = tuple(i for i in indices if i not in set(held_out))
    assert not {documents[i].digest for i in training} & {documents[i].digest for i in held_out}
    return training, held_out


def _check_lossless(held_out: Sequence[Document], tokenizer: Tokenizer, path: str) -> None:
    """Bits per byte mean something only when the ids determine every byte."""
    for document in held_out:
        if tokenizer.decode(tokenizer.encode(document.text)) != document.text:
            raise UserError(
                f"data.tokenizer_path is {path!r}; it does not reproduce the text of {document.name}, so bits per byte"
                " would be wrong: use a byte-level tokenizer without normalisation"
            )


def _named(documents: Sequence[Document], duplicate: Duplicate) -> tuple[str, str, float]:
    return documents[duplicate.dropped].name, documents[duplicate.kept].name, round(duplicate.similarity, 4)


def _offsets(lengths: np.ndarray | Sequence[int]) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


# ---------------------------------------------------------------- cache


def _write_tokens(folder: pathlib.Path, name: str, documents: Sequence[Document], tokenizer: Tokenizer) -> int:
    """Writes tokens_NAME, its checks and the documents' offsets; returns the number of tokens.

    If some are not to be learned, weights_NAME says which, with checks of its own.
    """
    plain = iter(tokenizer.encode_many([d.text for d in documents if not (d.special or d.masked)]))
    ids, weights = list[np.ndarray](), dict[int, np.ndarray]()
    for number, d in enumerate(documents):
        if d.special or d.masked:
            own, weights[number] = encode(Marked(d.text, d.special, d.masked), tokenizer)
            ids.append(own)
        else:
            ids.append(next(plain))
    tokens = np.concatenate([i.astype(_dtype(tokenizer.vocab_size)) for i in ids])
    (folder / f"checks_{name}").write_bytes(write_tokens(folder / f"tokens_{name}", tokens))
    (folder / f"offsets_{name}").write_bytes(_offsets([i.size for i in ids]).astype("<i8").tobytes())
    if any(d.masked for d in documents):
        learned = [weights.get(number, np.ones(own.size)).astype(np.uint8) for number, own in enumerate(ids)]
        checks = write_tokens(folder / f"weights_{name}", np.concatenate(learned))
        (folder / f"weight_checks_{name}").write_bytes(checks)
    return tokens.size


def _dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 2**16 else "<u4"


def _made(folder: pathlib.Path) -> pathlib.Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache folder {str(folder)!r} cannot be made ({error.strerror})") from error
    return folder


def _beside(folder: pathlib.Path, state: str) -> pathlib.Path:
    """A name next to a cache entry that no other process uses (and on the same file system, for renames)."""
    return folder.with_name(f".{state}-{os.getpid()}-{secrets.token_hex(4)}")


def _publish(building: pathlib.Path, folder: pathlib.Path) -> None:
    """Renames a finished entry into place; whoever else was first with the same contents wins."""
    try:
        building.rename(folder)
    except OSError:
        if not folder.is_dir():  # else: another process was faster, and a folder that holds files is not replaced
            raise


def build_entry(folder: pathlib.Path, build: Callable[[pathlib.Path], None]) -> None:
    """A cache entry, made by ``build`` in an empty folder beside its place and moved there: whole, or not there."""
    building = _made(_beside(folder, "building"))
    try:
        build(building)
        _publish(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _load(folder: pathlib.Path, cfg: DataConfig) -> Corpus | None:
    return load_entry(folder, lambda folder: _read(folder, cfg))


def load_entry(folder: pathlib.Path, read: Callable[[pathlib.Path], T]) -> T | None:
    """The verified entry; None if there is none, or it is damaged (said in one line, and moved out of the way)."""
    if not folder.is_dir():
        return None
    try:
        return read(folder)
    except Exception as error:  # whatever is wrong with it, it can be made again
        _log.warning("data cache %s is damaged (%s); it is built again", folder, error)
        aside = _beside(folder, "damaged")
        with contextlib.suppress(FileNotFoundError):  # another process may have done the same
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
        return None


def _read(folder: pathlib.Path, cfg: DataConfig) -> Corpus:
    body = manifest.read(folder)
    # Token files have their own checks, see token_file.py; so that a large one need not be read before the first step.
    others = [name for name in body["files"] if not name.startswith(("tokens_", "weights_"))]
    for name, found in manifest.inventory(folder, others).items():
        if found != body["files"][name]:
            raise manifest.Damaged(f"{name} fails its checksum")
    tokenizer = parse_tokenizer(
        (folder / "tokenizer.json").read_text(encoding="utf-8"), str(folder), end_token=cfg.end_token
    )
    dtype = _dtype(tokenizer.vocab_size)
    stores = tuple(_read_store(folder, str(number), body["files"], dtype) for number in range(len(cfg.sources)))
    held = _read_store(folder, "held_out", body["files"], dtype)
    with (folder / "held_out.jsonl").open("rb") as file:
        records = [json.loads(line) for line in file]
    held_out = tuple(
        HeldOut(r["name"], r["text"], held.tokens[held.offsets[i] : held.offsets[i + 1]].astype(np.int32))
        for i, r in enumerate(records)
    )
    report = body["report"]
    report["skipped"] = tuple(Skipped(**item) for item in report["skipped"])
    report["duplicates"] = tuple(tuple(item) for item in report["duplicates"])
    content = body["content"]
    fingerprint = _fingerprint(content, cfg)
    return Corpus(stores, held_out, tokenizer, fingerprint, CorpusReport(**report), content=content)


def open_tokens(folder: pathlib.Path, name: str, checks: str, files: dict[str, Any], dtype: str) -> TokenFile:
    """A file of tokens in a cache entry whose manifest lists ``files``, read through unless that takes long."""
    num_bytes = files[name]["bytes"]
    tokens = TokenFile(folder / name, dtype=dtype, num_bytes=num_bytes, checks=(folder / checks).read_bytes())
    if num_bytes <= _VERIFIED_AT_START:
        tokens.verify()
    return tokens


def _read_store(folder: pathlib.Path, name: str, files: dict[str, Any], dtype: str) -> TokenStore:
    tokens = open_tokens(folder, f"tokens_{name}", f"checks_{name}", files, dtype)
    offsets = np.frombuffer((folder / f"offsets_{name}").read_bytes(), "<i8")
    if offsets[0] != 0 or offsets[-1] != tokens.size or (np.diff(offsets) < 0).any():
        raise manifest.Damaged(f"offsets_{name} does not fit its tokens")
    if f"weights_{name}" not in files:
        return TokenStore(tokens, offsets)
    weights = open_tokens(folder, f"weights_{name}", f"weight_checks_{name}", files, "|u1")
    if weights.size != tokens.size:
        raise manifest.Damaged(f"weights_{name} does not fit its tokens")
    return TokenStore(tokens, offsets, weights=weights)


def _fingerprint(content: str, cfg: DataConfig) -> str:
    # Not batch_size: the iterator's state counts rows, so a run may go on with another batch.
    weights = [float(source.weight) for source in cfg.sources]
    other_end = () if cfg.end_token == END else (cfg.end_token,)  # of a tokenizer whose file has several
    settings = (_ROWS_VERSION, content, cfg.seq_len, cfg.seed, weights, *other_end)
    return hashlib.sha256(repr(settings).encode()).hexdigest()
