"""Thousands of damaged files of every format that is loaded: each gives a valid value or the typed error, at once.

The files are read in a child, see children.py: a library that aborts, hangs or takes gigabytes is a failure, too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

from chaos import Goal
from chaos.children import failures
from chaos.mutations import mutate_bytes, mutate_document, mutate_json, mutate_lines, mutate_safetensors

NAME = "damaged safetensors, manifests, tokenizers, configs: a typed error within a second"
SECONDS = 1.0  # that a file may take


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        name: for messages.
        make: writes good files into a folder.
        victims: which of them are damaged; empty: any.
        mutate: content, generator -> damaged content.
        read: reads the folder as dsjax does, and asserts that what it finds can be used; the value is compared with
            that of the good files if `exact`.
        exact: a mutant that can be read must give the same value: the format has checksums.
    """

    name: str
    make: Callable[[pathlib.Path], None]
    victims: tuple[str, ...]
    mutate: Callable[[bytes, random.Random], bytes]
    read: Callable[[pathlib.Path], Any]
    exact: bool = False


# ---------------------------------------------------------------- the formats

_INDEX, _SHARD, _LINK = "model.safetensors.index.json", "model-00001-of-00002.safetensors", "link.safetensors"


def _make_tensors(folder: pathlib.Path) -> None:
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    first = {"a.weight": np.ones((3, 4), ml_dtypes.bfloat16), "a.bias": np.arange(5.0), "step": np.arange(1)}
    second = {"b.weight": np.ones((2, 6), np.float16), "b.scale": np.zeros((0, 3), np.float32)}
    save_file(first, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(second, folder / "model-00002-of-00002.safetensors")
    files = {name: f"model-0000{i}-of-00002.safetensors" for i, part in ((1, first), (2, second)) for name in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 100}, "weight_map": files}, indent=2)
    )
    (folder / _LINK).symlink_to(f"../good-0/{_SHARD}")


def _mutate_index(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.7:
        return mutate_document(content, rng)
    index = json.loads(content)
    there = f"good-0/{_SHARD}"  # a good file, and beside the folder
    index["weight_map"][rng.choice(("a.weight", "a.bias"))] = rng.choice((f"../{there}", f"./../{there}", _LINK))
    return json.dumps(index).encode()


def _read_tensors(folder: pathlib.Path) -> None:
    from dsjax.tensor_files import TensorFiles

    tensors = TensorFiles(folder)
    for name in tensors:
        kind, array = tensors.kind(name), tensors[name]
        assert array.shape == kind.shape
        assert array.dtype == kind.dtype
        assert array.nbytes <= kind.file.stat().st_size
        assert kind.file.resolve().parent == folder.resolve()


def _make_checkpoint(folder: pathlib.Path) -> None:
    from dsjax import manifest

    (folder / "state" / "d").mkdir(parents=True)
    (folder / "state" / "d" / "0").write_bytes(random.Random(0).randbytes(3000))
    (folder / "state" / "metadata").write_text(json.dumps({"w": [3, 4]}))
    host = {"data": {"rows_taken": 96, "fingerprint": "f" * 64}, "counters": {"iteration": 12, "total_steps": 20}}
    (folder / "host.json").write_text(json.dumps(host))
    arrays = {"params/w": {"shape": [3, 4], "dtype": "float32"}, "step": {"shape": [], "dtype": "int32"}}
    about = {"format": 1, "step": 12, "arrays": arrays, "mesh": {"data": 2}, "data_fingerprint": "f" * 64}
    manifest.write(folder, about, manifest.inventory(folder, manifest.files_of(folder)))


def _read_checkpoint(folder: pathlib.Path) -> Any:
    from dsjax import manifest

    body = manifest.read(folder)
    for name in body["files"]:
        assert (folder / name).resolve().is_relative_to(folder.resolve()), name
    manifest.verify(folder, body)
    return body


def _mutate_sealed(content: bytes, rng: random.Random) -> bytes:
    """A manifest with a changed body whose seal is right: written wrongly, not damaged."""
    sealed = json.loads(content)
    if rng.random() < 0.2:
        files = sealed["body"]["files"]
        files[rng.choice(("../good-2/host.json", "state/../../good-2/host.json"))] = files.pop("host.json")
    changed = mutate_json(json.dumps(sealed["body"]).encode(), rng)
    try:
        canonical = json.dumps(json.loads(changed), sort_keys=True).encode()
    except (ValueError, RecursionError):
        canonical = changed
    seal = hashlib.sha256(canonical).hexdigest()
    return b'{"body": ' + changed + b', "sha256": "' + seal.encode() + b'"}'


_TEXTS = ["def f(self):\n        return self.value_1 + 12345\n" * 20, "class A:\n    x = '<|end|>'\n\n    y = 2\n" * 20]


def _make_tokenizer(folder: pathlib.Path) -> None:
    from dsjax.data.tokenizer import train_tokenizer

    (folder / "tokenizer.json").write_text(train_tokenizer(_TEXTS, 290, ("<|fim|>",)).to_json(), encoding="utf-8")


def _mutate_tokenizer(content: bytes, rng: random.Random) -> bytes:
    """The parts that decide how text is read, and now and then one of the vocabulary's hundreds of entries."""
    if rng.random() < 0.3:
        return mutate_document(content, rng)
    tree = json.loads(content)
    model = {key: tree["model"].pop(key) for key in ("vocab", "merges")}
    if rng.random() < 0.3:
        part = rng.choice(("normalizer", "pre_tokenizer", "decoder", "post_processor"))
        tree[part] = json.loads(json.dumps(rng.choice(_PARTS)))
    if rng.random() < 0.3:
        tree["model"] = {
            "type": rng.choice(("WordPiece", "WordLevel", "Unigram", "BPE")),
            "unk_token": "?",
            "unk_id": 9,
        }
    damaged = mutate_json(json.dumps(tree).encode(), rng)
    try:
        tree = json.loads(damaged)
        tree["model"] = model | tree["model"]
        return json.dumps(tree).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        return damaged


_PARTS: tuple[dict[str, Any], ...] = (
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Replace", "pattern": {"Regex": ""}, "content": "xx"},
    {"type": "Replace", "pattern": {"String": "a"}, "content": "x" * 1000},
    {"type": "Prepend", "prepend": ""},
    {"type": "Strip", "content": "x", "start": 2**40, "stop": 2**60, "strip_left": True, "strip_right": True},
    {"type": "Metaspace", "replacement": "xx", "prepend_scheme": "always"},
    {"type": "Split", "pattern": {"Regex": "(a{1000}){1000}"}, "behavior": "Isolated", "invert": True},
    {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Removed", "invert": False},
    {"type": "FixedLength", "length": 0},
    {"type": "Punctuation", "behavior": "Contiguous"},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "?", "type_id": 0}}], "pair": [],
     "special_tokens": {}},
    {"type": "ByteFallback"},
    {"type": "WordPiece", "prefix": "", "cleanup": True},
    {"type": "Sequence", "normalizers": [], "pretokenizers": [], "decoders": [], "processors": []},
)  # fmt: skip


def _read_tokenizer(folder: pathlib.Path) -> None:
    from dsjax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder / "tokenizer.json")
    for text in (*_TEXTS, "", "é深😀\0"):
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids.tolist())
        assert isinstance(tokenizer.decode(ids), str)
    assert len(tokenizer.encode_many(_TEXTS)) == len(_TEXTS)
    assert 0 <= tokenizer.end_id < tokenizer.vocab_size


def _make_config(folder: pathlib.Path) -> None:
    from small_runs import small_moe

    from dsjax.config import to_dict

    (folder / "config.json").write_text(json.dumps(to_dict(small_moe()), indent=1))


def _read_config(folder: pathlib.Path) -> None:
    from dsjax.config import from_dict, to_dict, validate
    from dsjax.runs import RunFolder

    config = RunFolder(folder).read_config()
    validate(config)
    assert from_dict(json.loads(json.dumps(to_dict(config), allow_nan=False))) == config


def _make_metrics(folder: pathlib.Path) -> None:
    records: list[dict[str, Any]] = [
        {"step": step, "loss": 2.5, "lr": None, "tokens_seen": 128 * step, "seconds": 0.5} for step in range(1, 6)
    ]
    records.append({"step": 5, "held_out_bits_per_byte": 3.5, "tokens_seen": 640, "seconds": 0.75})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def _read_metrics(folder: pathlib.Path) -> None:
    from dsjax.metrics import read_metrics

    for record in read_metrics(folder / "metrics.jsonl"):
        assert type(record["step"]) is int
        assert all(value is None or type(value) in (int, float) for value in record.values()), record
        json.dumps(record, allow_nan=False)


def _data_config(folder: pathlib.Path) -> Any:
    from dsjax.data.corpus import Source
    from dsjax.data.prepare import DataConfig

    return DataConfig(sources=(Source(str(folder)),), vocab_size=280, seq_len=16, held_out_share=0.3)


def _make_cache(folder: pathlib.Path) -> None:
    from small_runs import write_corpus

    from dsjax.data.prepare import prepare

    with tempfile.TemporaryDirectory() as place:
        write_corpus(pathlib.Path(place, "corpus"))
        prepare(_data_config(pathlib.Path(place, "corpus")), pathlib.Path(place, "cache"))
        (entry,) = pathlib.Path(place, "cache").iterdir()
        shutil.copytree(entry, folder / "entry")


def _read_cache(folder: pathlib.Path) -> Any:
    import numpy as np

    from dsjax.config import UserError
    from dsjax.data import prepare

    corpus = prepare._load(folder / "entry", _data_config(folder))
    if corpus is None:
        raise UserError("found damaged, and made anew")
    held_out = [(document.name, document.text, document.ids.tolist()) for document in corpus.held_out]
    tokens = [(np.asarray(store.tokens).tolist(), store.offsets.tolist()) for store in corpus.stores]
    return tokens, held_out, corpus.fingerprint, corpus.tokenizer.to_json(), corpus.report


FORMATS = (
    Format("safetensors", _make_tensors, (_SHARD,), mutate_safetensors, _read_tensors),
    Format("safetensors index", _make_tensors, (_INDEX,), _mutate_index, _read_tensors),
    Format("manifest", _make_checkpoint, ("manifest.json",), mutate_document, _read_checkpoint, exact=True),
    Format("manifest with a right seal", _make_checkpoint, ("manifest.json",), _mutate_sealed, _read_checkpoint),
    Format("host.json", _make_checkpoint, ("host.json",), mutate_document, _read_checkpoint, exact=True),
    Format("tokenizer", _make_tokenizer, ("tokenizer.json",), _mutate_tokenizer, _read_tokenizer),
    Format("config", _make_config, ("config.json",), mutate_document, _read_config),
    Format("metrics", _make_metrics, ("metrics.jsonl",), mutate_lines, _read_metrics),
    Format("data cache", _make_cache, (), mutate_bytes, _read_cache, exact=True),
)


# ---------------------------------------------------------------- trials


def _defences_off() -> None:
    """What the library would do without its checks."""
    import contextlib

    from dsjax import manifest, tensor_files
    from dsjax.data import tokenizer

    def anything(*_: object) -> bool:
        return True

    manifest.stays_inside = tensor_files.stays_inside = tensor_files._inside = anything  # type: ignore[assignment]
    tokenizer._told_as_user_error = lambda what: contextlib.nullcontext()  # type: ignore[assignment]


def trials(place: pathlib.Path, seed: int, defended: bool) -> Callable[[int], str]:
    """Makes the good files; gives a function from the number of a mutant to what was wrong with how it was met."""
    goods = []
    for number, format in enumerate(FORMATS):
        good = place / f"good-{number}"
        good.mkdir()
        format.make(good)
    for number, format in enumerate(FORMATS):
        goods.append(format.read(_copy(place / f"good-{number}")))
    if not defended:
        _defences_off()

    def trial(index: int) -> str:
        number = index % len(FORMATS)
        said = _try(FORMATS[number], place / f"good-{number}", goods[number], random.Random(f"{seed} {index}"))
        return said and f"{FORMATS[number].name}: {said}"

    return trial


def _copy(good: pathlib.Path) -> pathlib.Path:
    work = good.with_name("work")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(good, work, symlinks=True)
    return work


def _try(format: Format, good: pathlib.Path, expected: Any, rng: random.Random) -> str:
    from dsjax.config import UserError
    from dsjax.manifest import Damaged

    work = _copy(good)
    names = format.victims or sorted(p.relative_to(work).as_posix() for p in work.rglob("*") if p.is_file())
    victim = work / rng.choice(names)
    victim.write_bytes(format.mutate(victim.read_bytes(), rng))
    begin, said = time.perf_counter(), ""
    try:
        found = format.read(work)
        if format.exact and found != expected:
            said = "was taken for good"
    except (UserError, Damaged) as error:
        if "\n" in str(error) or len(str(error)) > 1000:
            said = f"was told in {len(str(error))} characters: {str(error)[:200]!r}"
    except BaseException as error:
        said = f"raised {type(error).__name__}: {str(error)[:200]}"
    seconds = time.perf_counter() - begin
    return f"{said} took {seconds:.1f} s" if seconds > SECONDS else said


def run(n: int, seed: int = 0) -> Goal:
    """Tries n mutants, and a few hundred with the defences off, of which some must fail."""
    begin = time.perf_counter()
    found = tuple(failures("chaos.formats", n, seed))
    few = min(n, 300)
    without = len(tuple(failures("chaos.formats", few, seed, defended=False)))
    return Goal(NAME, n, found, time.perf_counter() - begin, f"{without} of {few} fail with the checks off")
