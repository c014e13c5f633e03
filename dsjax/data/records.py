"""Reading one file record by record: text, JSON lines, parquet. A damaged record costs no other, and is named.

A record is one text file, one line of a JSONL file or one row of a parquet file. What the user got wrong (a `text_key`
that no record of a file has) is a `UserError`; what is broken is a `Skipped` with `damaged` set.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import io
import json
import pathlib
import tokenize
import zlib
from collections.abc import Iterator
from typing import Any

from dsjax.config import UserError
from dsjax.data.marked import Marked, Span, parse_marked

RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


@dataclasses.dataclass(frozen=True)
class Document:
    """One text and a name to find it by: a path relative to its source, with a line or row number in record files.

    special, masked: spans of characters that are special tokens, and that are no targets of the loss; see
        `dsjax.data.marked`. Empty but in a source that says that it is marked.
    """

    name: str
    text: str
    special: tuple[Span, ...] = ()
    masked: tuple[Span, ...] = ()

    @functools.cached_property
    def content(self) -> bytes:
        """The text in UTF-8: what every byte count refers to."""
        return self.text.encode()

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 of the content (32 bytes), and of what is said of its parts, if anything is."""
        spans = repr((self.special, self.masked)).encode() if self.special or self.masked else b""
        return hashlib.sha256(self.content + spans).digest()


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Something that was found and not used.

    name: as a document's; "FILE:rows 1-9" and the like for a part of a file.
    reason: "empty", or what is broken.
    offset: the byte of the file where it begins. In a .jsonl.gz a line's counts in the decompressed text, a gzip
        member's in the file.
    records: how many records it stands for; 0 where nobody can tell.
    damaged: whether it counts against `data.max_damaged_share`.
    """

    name: str
    reason: str
    offset: int = 0
    records: int = 1
    damaged: bool = True


def read_file(path: pathlib.Path, name: str, text_key: str, *, marked: bool = False) -> list[Document | Skipped]:
    """Every record of a file, in order; with ``marked``, records of JSON lines with the spans that they state.

    Raises:
        UserError: the file can not be opened or read, or `text_key` fits none of its records.
    """
    lower = path.name.lower()
    try:
        if lower.endswith((".jsonl", ".jsonl.gz")):
            return _read_jsonl(path, name, text_key, marked)
        if lower.endswith(".parquet"):
            return _read_parquet(path, name, text_key)
        return [_read_text(path, name)]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _record(name: str, text: str | None, offset: int, spans: Marked | None = None) -> Document | Skipped:
    if text is None or not text.strip():
        return Skipped(name, "empty", offset, damaged=False)
    return Document(name, text, spans.special, spans.masked) if spans else Document(name, text)


# ---------------------------------------------------------------- text


def _read_text(path: pathlib.Path, name: str) -> Document | Skipped:
    # Bytes are decoded by hand: text mode would translate newlines, and what is trained on must be what is on disk.
    content = path.read_bytes()
    encoding = "utf-8"
    try:
        if path.suffix.lower() in (".py", ".pyi"):
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        text = content.decode(encoding)
        text.encode()  # some codecs give halves of surrogate pairs
        return _record(name, text, 0)
    except UnicodeDecodeError as error:
        return Skipped(name, f"not {encoding}", error.start)
    except UnicodeError:
        return Skipped(name, f"not {encoding}")
    except (SyntaxError, LookupError):  # PEP 263: an unknown or contradictory cookie, or a codec that gives no text
        return Skipped(name, "unknown encoding")


# ---------------------------------------------------------------- JSON lines


class _Broken(Exception):
    """A record that can not be used; the message says why."""


class _OtherForm(_Broken):
    """JSON, but not an object with a text at `text_key`: one such is damage, nothing else is the user's mistake."""


def _read_jsonl(path: pathlib.Path, name: str, text_key: str, marked: bool) -> list[Document | Skipped]:
    content = path.read_bytes()
    items: list[Document | Skipped] = []
    if path.name.lower().endswith(".gz"):
        content, lost = _decompress(content)
        items += [Skipped(f"{name}:member at byte {at}", why, at, records=0) for at, why in lost]
    mistakes: list[str] = []
    num_right, offset = 0, 0
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        place, begin = f"{name}:{number}", offset
        offset += len(line) + 1
        if not line.strip():
            continue
        try:
            items.append(_record(place, *_of_line(line, text_key, marked, begin)))
            num_right += 1
        except _Broken as error:
            if isinstance(error, _OtherForm):
                mistakes.append(f"{path}:{number}: {error}")
                cut = False
            else:
                cut = number == len(lines)  # no newline after it: the file ends in the middle of this record
            items.append(Skipped(place, f"cut short, {error}" if cut else str(error), begin, records=0 if cut else 1))
    if mistakes and not num_right:
        raise UserError(mistakes[0])
    return items


def _of_line(line: bytes, text_key: str, marked: bool, begin: int) -> tuple[str | None, int, Marked | None]:
    """A line's text, where it begins, and the spans that it states."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        raise _Broken("not utf-8") from None
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
        raise _Broken(f"not a line of JSON ({str(error)[:100]})") from None
    if not isinstance(record, dict):
        raise _OtherForm(f"a JSON object was expected, found {type(record).__name__}")
    if text_key not in record:
        raise _OtherForm(_no_key(text_key, list(record)))
    text = record[text_key]
    if not isinstance(text, str | None):
        raise _OtherForm(f"{text_key!r} must be a string, found {type(text).__name__}")
    try:
        (text or "").encode()
    except UnicodeEncodeError:  # JSON may spell half of a surrogate pair, which no UTF-8 text can hold
        raise _Broken("not utf-8: half of a surrogate pair") from None
    if not (marked and text):
        return text, begin, None
    try:
        return text, begin, parse_marked(record | {"text": text}, "spans")
    except UserError as error:
        raise _Broken(str(error)[:200]) from None


def _no_key(text_key: str, keys: list[str]) -> str:
    near = difflib.get_close_matches(text_key, keys, n=1, cutoff=0.0)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    shown = ", ".join(map(repr, keys[:20])) + (", ..." if len(keys) > 20 else "")
    return f"no key {text_key!r} (text_key), found {shown or 'none'}{hint}"


_MAGIC = b"\x1f\x8b\x08"  # how every gzip member begins


def _decompress(content: bytes) -> tuple[bytes, list[tuple[int, str]]]:
    """The text of every whole gzip member, and (offset, reason) of those that are cut or fail their checksum.

    Nothing of such a member is used: what its checksum does not cover may be anything. The next one is looked for
    behind it, so a damaged member costs no other.
    """
    parts, lost, at = [], [], 0
    while at < len(content) and (at == 0 or content[at : at + 1] != b"\0" or content[at:].strip(b"\0")):
        try:
            text, at = _member(content, at)
            parts.append(text)
        except zlib.error as error:
            lost.append((at, f"gzip member is damaged: {error}"))
            parts.append(b"\n")  # what is before the gap and what is behind it are no one line
            at = _next_member(content, at + 1)
    return b"".join(parts), lost


def _member(content: bytes, at: int) -> tuple[bytes, int]:
    """The text of the gzip member at a place, and where it ends; zlib.error if it is not whole."""
    member, view, parts = zlib.decompressobj(wbits=31), memoryview(content), []
    while not member.eof:
        if at >= len(content):
            raise zlib.error("it is cut short")
        parts.append(member.decompress(view[at : at + 2**16]))  # in pieces: what it does not use it copies
        at += 2**16
    return b"".join(parts), min(at, len(content)) - len(member.unused_data)


def _next_member(content: bytes, at: int) -> int:
    """Where the next whole member begins; the end if there is none."""
    while (at := content.find(_MAGIC, at)) >= 0:
        try:
            _member(content, at)
            return at
        except zlib.error:  # three bytes that are there by chance
            at += 1
    return len(content)


# ---------------------------------------------------------------- parquet


def _read_parquet(path: pathlib.Path, name: str, text_key: str) -> list[Document | Skipped]:
    import pyarrow  # large, and only these files need it
    import pyarrow.parquet

    with path.open("rb") as handle:  # an OSError here is the file system's; pyarrow raises it for damage, too
        broken = (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError, KeyError)
        try:
            file = pyarrow.parquet.ParquetFile(handle, page_checksum_verification=True)
            names, groups = list(file.schema_arrow.names), file.metadata.num_row_groups
            kind = file.schema_arrow.field(text_key).type if text_key in names else None
            counts = [file.metadata.row_group(group).num_rows for group in range(groups)]
        except broken as error:
            return [Skipped(name, f"not a readable parquet file ({_first_line(error)})", records=0)]
        if kind is None:
            raise UserError(f"{path}: {_no_key(text_key, names)}")
        if not _holds_text(kind):
            raise UserError(f"{path}: {text_key!r} must be a column of strings, found {kind}")
        items: list[Document | Skipped] = []
        first = 1
        for group, count in enumerate(counts):
            rows = f"{name}:rows {first}-{first + count - 1}"
            offset = 0
            try:
                offset = _offset(file.metadata.row_group(group), names.index(text_key))
                column = file.read_row_group(group, columns=[text_key]).column(0)
                if len(column) != count:
                    raise ValueError(f"{len(column)} rows instead of {count}")
                values = list(_texts(column))
            except broken as error:
                items.append(Skipped(rows, f"can not be read ({_first_line(error)})", offset, records=max(count, 1)))
            else:
                for row, value in enumerate(values, start=first):
                    place = f"{name}:{row}"
                    if isinstance(value, _Broken):
                        items.append(Skipped(place, str(value), offset))
                    else:
                        items.append(_record(place, value, offset))
            first += count
    return items


def _holds_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)


def _texts(column: Any) -> Iterator[str | _Broken | None]:
    """The values of a column one by one, so that one that is not UTF-8 costs no other."""
    for scalar in column:
        try:
            yield scalar.as_py()
        except UnicodeDecodeError:
            yield _Broken("not utf-8")


def _offset(group: Any, column: int) -> int:
    """Where the pages of a column of a row group begin."""
    chunk = group.column(column)
    begins = [chunk.dictionary_page_offset, chunk.data_page_offset]
    return min(at for at in begins if at is not None)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:150]
