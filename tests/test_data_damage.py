"""Damage to training data: counted with its place, over the budget refused, between two starts named, in a run seen."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import pathlib
import random
import re
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from chaos import data_faults
from chaos.children import failures
from small_runs import write_corpus

from dsjax.config import UserError
from dsjax.data import prepare as prepare_module
from dsjax.data.corpus import Source, changed_documents, check_damage, describe_skipped, read_source
from dsjax.data.pipeline import make_batches
from dsjax.data.prepare import DataConfig, prepare
from dsjax.data.token_file import BLOCK, TokenFile, write_tokens

GOOD = [json.dumps({"text": f"text {i}", "id": i}).encode() for i in range(8)]


def _skipped(path: pathlib.Path) -> list[tuple[str, int, int, str]]:
    return [(s.name, s.offset, s.records, s.reason) for s in read_source(Source(str(path))).skipped]


def _texts(path: pathlib.Path) -> list[str]:
    return [d.text for d in read_source(Source(str(path))).documents]


# ---------------------------------------------------------------- single records


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a', "not a line of JSON"),
        (b'{"text": "\xff"}', "not utf-8"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"txet": "a"}', "no key 'text' (text_key), found 'txet'"),
        (b'{"text": 7}', "'text' must be a string, found int"),
        (b'["text"]', "a JSON object was expected, found list"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not a line of JSON"),
        (b"[" * 100_000, "not a line of JSON"),
    ],
)
def test_a_damaged_line_is_named_and_costs_no_other(tmp_path: pathlib.Path, line: bytes, reason: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n".join([*GOOD[:3], line, *GOOD[3:], b""]))
    ((name, offset, records, why),) = _skipped(path)
    assert (name, offset, records) == ("d.jsonl:4", sum(len(g) + 1 for g in GOOD[:3]), 1)
    assert reason in why
    assert path.read_bytes()[offset:].startswith(line)
    assert _texts(path) == [f"text {i}" for i in range(8)]


def test_a_null_text_is_empty_and_no_damage(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n".join([*GOOD, b'{"text": null}', b'{"text": " "}', b""]))
    assert [(s.reason, s.damaged) for s in read_source(Source(str(path))).skipped] == [("empty", False)] * 2


def test_a_line_without_its_end_stands_for_records_that_nobody_can_count(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n".join(GOOD)[:-5])
    ((name, _, records, why),) = _skipped(path)
    assert (name, records) == ("d.jsonl:8", 8)  # as many as the fullest file has
    assert why.startswith("cut short, not a line of JSON")
    path.write_bytes(b"\n".join(GOOD))  # whole, without the last newline
    assert not _skipped(path)


def test_a_key_that_no_record_has_is_the_users_mistake(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n".join([*GOOD, b"broken", b""]))
    with pytest.raises(UserError, match=r"d\.jsonl:1: no key 'body' \(text_key\), found 'text', 'id'"):
        read_source(Source(str(path), text_key="body"))
    with pytest.raises(UserError, match=r"d\.jsonl:1: 'id' must be a string, found int"):
        read_source(Source(str(path), text_key="id"))


# ---------------------------------------------------------------- gzip


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m[:12] + bytes([m[12] ^ 4]) + m[13:],  # in the text: fails its checksum or before
        lambda m: m[:-8] + bytes([m[-8] ^ 1]) + m[-7:],  # the checksum
        lambda m: m[:-4] + bytes([m[-4] ^ 1]) + m[-3:],  # the length
        lambda m: b"\x1e" + m[1:],
        lambda m: m[: len(m) // 2],
    ],
)
@pytest.mark.parametrize("which", [0, 3, 7])
def test_a_damaged_gzip_member_costs_no_other(tmp_path: pathlib.Path, damage: Any, which: int) -> None:
    members = [gzip.compress(line + b"\n", mtime=0) for line in GOOD]
    place = sum(map(len, members[:which]))
    members[which] = damage(members[which])
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(b"".join(members))
    assert _texts(path) == [f"text {i}" for i in range(8) if i != which]
    ((name, offset, records, why),) = _skipped(path)
    assert (name, offset, records) == (f"d.jsonl.gz:member at byte {place}", place, 8)
    assert why.startswith("gzip member is damaged")


def test_nothing_of_a_cut_gzip_member_is_used_and_padding_is_no_damage(tmp_path: pathlib.Path) -> None:
    content = gzip.compress(b"\n".join([*GOOD, b""]))
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(content + b"\0" * 512)
    assert len(_texts(path)) == 8
    assert not _skipped(path)
    path.write_bytes(content[:-9])
    with pytest.raises(UserError, match=r"holds no document.*member at byte 0 .*cut short"):
        read_source(Source(str(path)))


# ---------------------------------------------------------------- parquet


def test_a_damaged_row_group_costs_no_other(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "d.parquet"
    table = pyarrow.table({"id": range(40), "text": [f"text {i}" for i in range(40)]})
    pyarrow.parquet.write_table(table, path, row_group_size=10, write_page_checksum=True)
    chunk = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(1)
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(path.read_bytes())
    content[begin + chunk.total_compressed_size - 3] ^= 16
    path.write_bytes(content)
    assert _texts(path) == [f"text {i}" for i in range(40) if not 20 <= i < 30]
    ((name, offset, records, why),) = _skipped(path)
    assert (name, offset, records) == ("d.parquet:rows 21-30", begin, 10)
    assert "can not be read" in why


def test_a_row_that_is_not_utf8_costs_no_other(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["aaaa", "bbbb", "cccc"]}), path, compression="none")
    path.write_bytes(path.read_bytes().replace(b"bbbb", b"b\xffbb"))
    assert _texts(path) == ["aaaa", "cccc"]
    assert [s[0] for s in _skipped(path)] == ["d.parquet:2"]


# ---------------------------------------------------------------- missing shards


@pytest.mark.parametrize("first", [0, 1])
def test_a_shard_that_the_names_of_the_others_promise_is_missed(tmp_path: pathlib.Path, first: int) -> None:
    for shard in range(first, first + 4):
        (tmp_path / f"train-{shard:05d}-of-00004.jsonl").write_bytes(b"\n".join([*GOOD, b""]))
    assert not _skipped(tmp_path)
    (tmp_path / "train-00002-of-00004.jsonl").unlink()
    ((name, _, records, why),) = _skipped(tmp_path)
    assert (name, records) == ("train-00002-of-00004.jsonl", 8)
    assert why.startswith("missing")
    assert not _skipped(pathlib.Path(f"{tmp_path}/*.jsonl"))  # a glob says which are meant


# ---------------------------------------------------------------- the budget


def _lines(folder: pathlib.Path, good: int, bad: int) -> DataConfig:
    rng = random.Random(good)
    lines = [
        json.dumps({"text": " ".join("".join(rng.choices("abcdef", k=4)) for _ in range(30))}) for _ in range(good)
    ]
    for number in range(bad):
        lines.insert(number * 3 + 1, "broken")
    (folder / "d.jsonl").write_text("\n".join([*lines, ""]))
    return DataConfig(sources=(Source(str(folder / "d.jsonl")),), vocab_size=280, seq_len=16, held_out_share=0.2)


def test_damage_over_the_budget_stops_and_within_it_is_counted(tmp_path: pathlib.Path) -> None:
    cfg = _lines(tmp_path, 30, 5)
    with pytest.raises(UserError) as caught:
        prepare(cfg, tmp_path / "c")
    said = str(caught.value)
    assert said.startswith(
        "5 of 35 records of the training data are damaged (0.143 of them; data.max_damaged_share is 0.001)"
    )
    assert re.search(r"data\.sources\.0: d\.jsonl:2 at byte \d+ \(not a line of JSON.*; and 2 more;", said)
    assert said.endswith("raise data.max_damaged_share")
    assert "\n" not in said
    for share, stops in ((5 / 35, False), (4.9 / 35, True), (1.0, False), (0.0, True)):
        changed = DataConfig(**{**vars(cfg), "max_damaged_share": share})
        with pytest.raises(UserError) if stops else contextlib.nullcontext():
            stages: list[str] = []
            corpus = prepare(changed, tmp_path / "c", progress=stages.append)
            assert "skipped 5 of 35 records: 0 empty, 5 damaged, the first d.jsonl:2" in stages[1]
            assert [s.name for s in corpus.report.skipped] == [f"d.jsonl:{n}" for n in (2, 5, 8, 11, 14)]
            assert all(s.damaged and s.offset > 0 for s in corpus.report.skipped)


def test_one_in_a_thousand_may_be_damaged(tmp_path: pathlib.Path) -> None:
    for good, stops in ((999, False), (998, True)):
        (tmp_path / "d.jsonl").write_bytes(b"\n".join([*GOOD * (good // 8), *GOOD[: good % 8], b"broken", b""]))
        readings = [read_source(Source(str(tmp_path / "d.jsonl")))]
        with pytest.raises(UserError) if stops else contextlib.nullcontext():
            check_damage(readings, DataConfig().max_damaged_share)


def test_the_standard_library_is_within_the_budget() -> None:
    readings = [read_source(Source())]
    check_damage(readings, DataConfig().max_damaged_share)
    assert " empty, 0 damaged" in describe_skipped(readings)


# ---------------------------------------------------------------- between two starts


def test_what_changed_between_two_starts_is_named(tmp_path: pathlib.Path) -> None:
    write_corpus(tmp_path / "s")
    source = Source(str(tmp_path / "s"))
    before = json.loads(json.dumps([read_source(source).digests]))
    assert changed_documents(before, [read_source(source).digests]) == ""
    (tmp_path / "s" / "3.txt").write_text("other")
    (tmp_path / "s" / "4.txt").unlink()
    for number in range(5):
        (tmp_path / "s" / f"new{number}.txt").write_text(f"new {number}")
    assert changed_documents(before, [read_source(source).digests]) == (
        "changed in data.sources.0: 3.txt; added in data.sources.0: new0.txt, new1.txt, new2.txt and 2 more;"
        " removed in data.sources.0: 4.txt"
    )
    assert max(len(digest) for files in before for digest in files.values()) <= 16  # a million files are to fit


@pytest.mark.parametrize("before", [None, {}, 3, [3], [], [{}, {}]])
def test_a_list_of_documents_that_is_none_is_told(before: Any) -> None:
    assert changed_documents(before, [{"a": "1"}])


def test_a_corpus_knows_its_documents(tmp_path: pathlib.Path) -> None:
    cfg = _lines(tmp_path, 30, 0)
    for _ in range(2):  # made, then from the cache
        (files,) = prepare(cfg, tmp_path / "c").documents
        assert list(files) == ["d.jsonl"]


# ---------------------------------------------------------------- tokens on disk


@pytest.mark.parametrize("size", [0, 1, BLOCK // 2 - 1, BLOCK // 2, BLOCK // 2 + 1, 5 * BLOCK])
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_every_slice_of_a_token_file_is_the_array(tmp_path: pathlib.Path, size: int, dtype: str) -> None:
    tokens = np.random.default_rng(size).integers(0, 60_000, size).astype(dtype)
    checks = write_tokens(tmp_path / "t", tokens)
    file = TokenFile(tmp_path / "t", dtype=dtype, num_bytes=tokens.nbytes, checks=checks)
    assert len(file) == file.size == size
    np.testing.assert_array_equal(np.asarray(file), tokens)
    for begin, end in np.random.default_rng(1).integers(0, size + 2, (50, 2)):
        np.testing.assert_array_equal(file[begin:end], tokens[begin:end])
    file.verify()


def test_a_flip_is_found_where_it_is_and_only_when_it_is_read(tmp_path: pathlib.Path) -> None:
    tokens = np.arange(4 * BLOCK, dtype="<u2")
    file = TokenFile(tmp_path / "t", dtype="<u2", num_bytes=tokens.nbytes, checks=write_tokens(tmp_path / "t", tokens))
    (tmp_path / "manifest.json").write_text("{}")
    with (tmp_path / "t").open("r+b") as handle:
        handle.seek(3 * BLOCK + 5)
        handle.write(b"\xfe")
    np.testing.assert_array_equal(file[: 3 * BLOCK // 2], tokens[: 3 * BLOCK // 2])
    assert (tmp_path / "manifest.json").exists()
    for read in (lambda: file[3 * BLOCK // 2 :], lambda: np.asarray(file), file.verify):
        with pytest.raises(UserError, match=rf"t is damaged at byte {3 * BLOCK}: .*start the command again"):
            read()
    assert not (tmp_path / "manifest.json").exists()  # so the next start makes the folder anew


def _read_through(batches: Any) -> None:
    for _ in range(100):
        next(batches)


def test_damage_in_a_run_ends_it_with_one_sentence_and_is_mended_by_the_next(tmp_path: pathlib.Path) -> None:
    write_corpus(tmp_path / "s")
    cfg = DataConfig(sources=(Source(str(tmp_path / "s")),), vocab_size=280, seq_len=16, held_out_share=0.2)
    corpus = prepare(cfg, tmp_path / "c")
    (entry,) = (tmp_path / "c").iterdir()
    with contextlib.closing(make_batches(corpus, cfg)) as batches:
        next(batches)
        os.truncate(entry / "tokens_0", 0)
        for _ in range(2):  # it does not come back to life, nor hang
            with pytest.raises(UserError, match=r"tokens_0 is damaged at byte \d+: it was cut short; start") as caught:
                _read_through(batches)
            assert "\n" not in str(caught.value)
    logging.disable(logging.WARNING)
    try:
        assert prepare(cfg, tmp_path / "c").fingerprint == corpus.fingerprint
    finally:
        logging.disable(logging.NOTSET)


def test_large_token_files_are_not_read_at_the_start(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_corpus(tmp_path / "s")
    cfg = DataConfig(sources=(Source(str(tmp_path / "s")),), vocab_size=280, seq_len=16, held_out_share=0.2)
    prepare(cfg, tmp_path / "c")
    (entry,) = (tmp_path / "c").iterdir()
    content = bytearray((entry / "tokens_0").read_bytes())
    content[-1] ^= 1
    (entry / "tokens_0").write_bytes(content)
    monkeypatch.setattr(prepare_module, "_VERIFIED_AT_START", 100)
    corpus = prepare(cfg, tmp_path / "c")
    assert not caplog.records
    with contextlib.closing(make_batches(corpus, cfg)) as batches, pytest.raises(UserError, match="is damaged at byte"):
        _read_through(batches)
    monkeypatch.undo()
    prepare(cfg, tmp_path / "c")
    assert "is built again" in caplog.text


def test_a_full_disk_is_one_sentence(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "write_tokens", full)
    with pytest.raises(UserError, match=r"data cache .* can not be written: No space left on device"):
        prepare(_lines(tmp_path, 30, 0), tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())


# ---------------------------------------------------------------- chaos


def test_no_damage_goes_unnoticed() -> None:
    assert not list(failures(data_faults.__name__, 60, 0))


def test_with_the_checks_off_damage_goes_unnoticed() -> None:
    found = list(failures(data_faults.__name__, 20, 0, defended=False))
    assert [said for said in found if "damaged tokens came in a batch" in said]
    assert [said for said in found if "the change is not named" in said]
