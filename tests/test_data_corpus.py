"""Reading sources, and what is said about bad ones."""

from __future__ import annotations

import gzip
import json
import os
import pathlib

import pyarrow
import pyarrow.parquet
import pytest

from dsjax.config import UserError
from dsjax.data.corpus import Source, read_source


def test_stdlib_is_the_interpreters_own_without_tests():
    names = {d.name for d in read_source(Source()).documents}
    assert {"ast.py", "json/decoder.py", "asyncio/base_events.py"} <= names
    assert not [n for n in names if {"test", "tests", "site-packages", "__pycache__"} & set(n.split("/"))]
    assert len(names) > 500


def test_folder_is_recursive_sorted_and_keeps_bytes(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "x.py").write_bytes(b"a = 1\r\nb = 2\r")
    (tmp_path / "a.txt").write_bytes("é\n\n".encode())
    (tmp_path / "z.bin").write_bytes(b"no text suffix")
    (tmp_path / ".git" / "c.py").write_bytes(b"hidden")
    documents = read_source(Source(str(tmp_path))).documents
    assert [(d.name, d.text) for d in documents] == [("a.txt", "é\n\n"), ("b/x.py", "a = 1\r\nb = 2\r")]


@pytest.mark.parametrize("pattern", ["", "/**"])
def test_names_that_are_not_utf_8_are_shown_escaped(tmp_path, pattern):
    folder = pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/etud\xe9"))
    folder.mkdir()
    (folder / "a.py").write_text("x = 1\n")
    (folder / "empty.py").touch()
    (folder / "b.jsonl").write_text('{"text": "hi"}\n{broken\n')
    reading = read_source(Source(f"{tmp_path}{pattern}"))
    names = [*(d.name for d in reading.documents), *(s.name for s in reading.skipped), *reading.digests]
    assert {name.removeprefix(f"{tmp_path}/").encode() for name in names} == {
        rb"etud\udce9/" + name for name in (b"a.py", b"b.jsonl:1", b"b.jsonl:2", b"empty.py", b"b.jsonl")
    }


def test_a_folder_behind_a_link_is_left_out(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "other").mkdir()
    for name in ("source/a.txt", "other/b.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "source" / "link").symlink_to(tmp_path / "other")
    assert [d.name for d in read_source(Source(str(tmp_path / "source"))).documents] == ["a.txt"]


def test_glob_takes_any_suffix(tmp_path):
    (tmp_path / "one.weird").write_text("1")
    (tmp_path / "two.weird").write_text("2")
    (tmp_path / "other.py").write_text("3")
    assert [d.text for d in read_source(Source(f"{tmp_path}/*.weird")).documents] == ["1", "2"]


def test_python_encoding_cookie_is_honoured(tmp_path):
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\ns = 'é'\n".encode("latin-1"))
    (document,) = read_source(Source(str(tmp_path))).documents
    assert document.text.endswith("s = 'é'\n")


def test_empty_and_undecodable_are_reported_not_lost(tmp_path):
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "blank.py").write_text(" \n")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "cookie.py").write_bytes(b"# coding: klingon\n")
    (tmp_path / "undefined.py").write_bytes(b"# coding: undefined\n")
    (tmp_path / "half.py").write_bytes(b"# coding: unicode_escape\nx = '\\ud800'\n")
    reading = read_source(Source(str(tmp_path)))
    assert [d.name for d in reading.documents] == ["good.py"]
    assert {s.name: (s.reason, s.damaged) for s in reading.skipped} == {
        "blank.py": ("empty", False),
        "bad.txt": ("not utf-8", True),
        "cookie.py": ("unknown encoding", True),
        "undefined.py": ("not undefined", True),
        "half.py": ("not unicode_escape", True),
    }


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_jsonl(tmp_path, suffix):
    lines = [json.dumps({"body": f"text {i}\u2028\n"}) for i in range(3)]
    content = ("\n".join(lines) + "\n\n").encode()
    path = tmp_path / f"d{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    documents = read_source(Source(str(path), text_key="body")).documents
    assert [d.text for d in documents] == [f"text {i}\u2028\n" for i in range(3)]
    assert documents[2].name == f"d{suffix}:3"


def test_parquet(tmp_path):
    table = pyarrow.table({"text": ["one", "", "three"], "id": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    reading = read_source(Source(str(tmp_path)))
    assert [d.text for d in reading.documents] == ["one", "three"]
    assert [s.name for s in reading.skipped] == ["d.parquet:2"]


def _jsonl(content: bytes):
    def write(folder):
        (folder / "d.jsonl").write_bytes(content)
        return folder / "d.jsonl"

    return write


def _parquet(folder):
    pyarrow.parquet.write_table(pyarrow.table({"txet": ["one"]}), folder / "d.parquet")
    return folder / "d.parquet"


def _named(name: str, content: bytes):
    def write(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return write


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            _jsonl(b'\n{"text": \n'),
            "holds no document: found 1 file(s), 1 empty or damaged record(s), the first d.jsonl:2",
        ),
        (
            _jsonl(b'{"txt": "a", "id": 1}\n'),
            "d.jsonl:1: no key 'text' (text_key), found 'txt', 'id'; the nearest is 'txt'",
        ),
        (_jsonl(b'{"text": 7}\n'), "d.jsonl:1: 'text' must be a string, found int"),
        (_jsonl(b"[1]\n"), "d.jsonl:1: a JSON object was expected, found list"),
        (_jsonl(b"\n"), "holds no document"),
        (_parquet, "no key 'text' (text_key), found 'txet'; the nearest is 'txet'"),
        (_named("d.parquet", b"not parquet"), "not a readable parquet file"),
        (_named("d.jsonl.gz", b"not gzip"), "gzip member is damaged"),
        (lambda folder: folder, "holds no document"),
        (lambda folder: folder / "nowhere", "does not exist"),
        (lambda folder: folder / "*.py", "holds no document"),
        (lambda folder: "", "a data source has an empty path"),
        (lambda folder: folder / ("a" * 300), "can not be read: File name too long"),
        (lambda folder: "~nobody_of_that_name/data", "can not be read: Could not determine home directory"),
    ],
)
def test_bad_sources_are_one_sentence(tmp_path, make, said):
    with pytest.raises(UserError) as caught:
        read_source(Source(str(make(tmp_path))))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_can_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # the owner of everything may read any folder
    with pytest.raises(UserError, match=r"sub: cannot be read \(Permission denied\)"):
        read_source(Source(str(tmp_path)))


def test_missing_path_names_the_nearest(tmp_path):
    (tmp_path / "corpus").mkdir()
    with pytest.raises(UserError, match=r"did you mean .*corpus"):
        read_source(Source(str(tmp_path / "corpsu")))
