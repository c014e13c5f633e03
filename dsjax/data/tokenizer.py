"""A byte-level BPE tokenizer: trained here, deterministic, and exact: decode(encode(text)) == text for any text."""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32, Integer
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsjax.config import UserError
from dsjax.data.layout_tokens import Writer, said, states_layout, with_layout
from dsjax.data.token_names import byte_level_bytes, bytes_of, hole_of

END = "<|end|>"  # the document boundary, and what padding holds

# How text is cut before BPE; merges never cross a cut. The pattern cuts only: every character is in some piece.
SPLIT = "|".join(
    (
        # An identifier whole, snake_case and dunder included, with the one character before it: " self", ".append".
        r"[^\r\n\t\p{L}\p{N}_]?[\p{L}_][\p{L}\p{M}\p{N}_]*",
        # Numbers in groups of at most three digits.
        r"\p{N}{1,3}",
        # Punctuation, a space before it, and the end of line with the next line's indentation: "):\n        ".
        r" ?[^\s\p{L}\p{N}_]+(?:[ \t]*(?:\r?\n)+[ \t]*)?",
        # The same end of line with indentation after anything else: the depth of a block is one token.
        r"[ \t]*(?:\r?\n)+[ \t]*",
        # Any other white space; of a run of blanks the last is left to the word that follows.
        r"\s+(?!\S)|\s",
    )
)
# The same for the form of texts with layout: "):\n" and the signs behind it, and what indents the next line further.
LAYOUT_SPLIT = with_layout(SPLIT)

MOST_BYTES = 2**28  # of a tokenizer.json; the largest in use have 2**25

# Every tokenizer that is loaded encodes and decodes them: a damaged one may load, and fail or panic at the first text.
_SAMPLES = ("", "a", "some text", "".join(map(chr, range(256))), "def f(x):\n    return 12345  # é 深 😀\r\n")


@contextlib.contextmanager
def _told_as_user_error(what: str) -> Iterator[None]:
    """Turns what the library raises into one sentence. It raises plain `Exception`, and where its Rust code panics a
    `BaseException`, which has no public name.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({' '.join(str(error).split())[:200]})") from error


class Tokenizer:
    """Ids for text and back. Special tokens are never produced from text, however it is spelt.

    Attributes:
        vocab_size: the largest id plus one: number of ids, special tokens included.
        end_id: the id of the document boundary.
        added_ids: id of each token that was added to the model's own, by its name.
        special_ids: those of them that are special.
        begin_ids: what stands in front of a text that begins a document: here, the boundary.
        layout: whether tokens stand for the form of texts of :mod:`dsjax.data.layout`.
    """

    def __init__(self, inner: tokenizers.Tokenizer, *, end_token: str = END):
        # A text that contains "<|end|>" (this file does) must not end a document: specials are spelt out in bytes.
        inner.encode_special_tokens = True
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner
        self._added = {t.content: t for t in inner.get_added_tokens_decoder().values()}
        self.added_ids = {t.content: i for i, t in inner.get_added_tokens_decoder().items()}
        self.special_ids = {name: i for name, i in self.added_ids.items() if self._added[name].special}
        if end_token not in self.special_ids:
            raise UserError(
                f"the tokenizer has no special token {end_token!r}; it has {', '.join(self.special_ids) or 'none'}"
            )
        self.end_id = self.special_ids[end_token]
        self.begin_ids: tuple[int, ...] = (self.end_id,)
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self.layout = inner.pre_tokenizer is not None and states_layout(inner.pre_tokenizer.__getstate__().decode())

    def encode(self, text: str, *, added: bool = True) -> Int32[np.ndarray, " T"]:
        """The ids of a text, without boundary tokens; without ``added``, no token that was added to the model's own."""
        (form,) = self.said([text])
        return self.encode_said(str(form), added=added)

    def encode_said(self, text: str, *, added: bool = True) -> Int32[np.ndarray, " T"]:
        """The same for one of the texts that :meth:`said` gives."""
        inner = self._inner if added else self._bare
        with _told_as_user_error("the tokenizer can not encode a text"):
            return np.asarray(inner.encode(text, add_special_tokens=False).ids, np.int32)

    def said(self, parts: Sequence[str | int]) -> list[str | int]:
        """Texts that follow one another, with tokens between some of them, as they are to be encoded one by one.

        They are as they were, but with ``layout``: then a text depends on those in front of it.
        """
        if not self.layout:
            return list(parts)
        with _told_as_user_error("the tokenizer can not encode a text"):
            return said(parts, self.writer())

    def writer(self, behind: Iterable[int] = ()) -> Writer:
        """With ``layout``: what writes the text of tokens as they come, behind some others."""
        writer = Writer(self._texts, hole_of(self.special_ids))
        for token in behind:
            writer.add(int(token))
        return writer

    @functools.cached_property
    def _texts(self) -> list[bytes]:
        return bytes_of(self.names(), self.special_ids)

    @functools.cached_property
    def _bare(self) -> tokenizers.Tokenizer:
        content = json.loads(self._inner.to_str()) | {"added_tokens": [], "post_processor": None}
        return tokenizers.Tokenizer.from_str(json.dumps(content))

    def encode_parts(self, parts: Sequence[str | int], *, never: Collection[str] = ()) -> list[int]:
        """The ids of texts and of added tokens, given by id, that follow one another.

        White space around an added token goes where its entry in the tokenizer says so. Texts that hold one of the
        names in ``never`` do not get its token.
        """
        names, texts = {i: name for name, i in self.added_ids.items()}, list[str | int]()
        for number, part in enumerate(parts):
            if isinstance(part, int):
                texts.append(part)
                continue
            before, after = parts[number - 1] if number else None, (*parts, None)[number + 1]
            text = part
            if isinstance(before, int) and self._added[names[before]].rstrip:
                text = text.lstrip()
            if isinstance(after, int) and self._added[names[after]].lstrip:
                text = text.rstrip()
            texts.append(text)
        ids = list[int]()
        for whole, form in zip(texts, self.said(texts), strict=True):
            if isinstance(form, int):
                ids.append(form)
            else:
                ids += self.encode_said(form, added=not any(name in str(whole) for name in never)).tolist()
        return ids

    def put_in_front(self) -> tuple[int, ...]:
        """What the tokenizer's own file puts in front of a text."""
        with _told_as_user_error("the tokenizer can not encode a text"):
            encoded = self._inner.encode("a", add_special_tokens=True)
        mask = [*encoded.special_tokens_mask, 0]
        return tuple(encoded.ids[: mask.index(0)])

    def encode_many(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " T"]]:
        """`encode` of each text, in parallel on all cores (no effect on the ids)."""
        ids: list[np.ndarray] = []
        first = 0
        while first < len(texts):
            # About a million characters at a time: encodings hold far more than ids, 100 bytes and more a token.
            last, size = first, 0
            while last < len(texts) and size < 2**20:
                size += len(texts[last])
                last += 1
            forms = [str(form) for text in texts[first:last] for form in self.said([text])]
            with _told_as_user_error("the tokenizer can not encode a text"):
                encodings = self._inner.encode_batch_fast(forms, add_special_tokens=False)
            ids += [np.asarray(e.ids, np.int32) for e in encodings]
            first = last
        return ids

    def decode(
        self,
        ids: Sequence[int] | Integer[np.ndarray, " T"],
        *,
        skip_special: bool = True,
        behind: Sequence[int] | Integer[np.ndarray, " P"] = (),
    ) -> str:
        """The text of ids; bytes that form no UTF-8 (a cut character) become U+FFFD.

        With ``layout`` it depends on the ids in front, ``behind``, whose own text is not given.
        """
        with _told_as_user_error("the tokenizer can not decode ids"):
            if self.layout:
                return self._written([int(i) for i in ids], skip_special, [int(i) for i in behind])
            return self._inner.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def _written(self, ids: Sequence[int], skip_special: bool, behind: Sequence[int]) -> str:
        writer = self.writer(behind)
        names = {} if skip_special else {i: name.encode() for name, i in self.special_ids.items()}
        return b"".join(writer.add(i) or names.get(i, b"") for i in ids).decode(errors="replace")

    def extensions(self, token: int) -> Bool[np.ndarray, " V"]:
        """Which ids stand for text that begins with the text of ``token``, itself included."""
        start = self._texts[token]
        return np.array([i == token or (start != b"" and text.startswith(start)) for i, text in enumerate(self._texts)])

    def names(self) -> list[str]:
        """How the tokenizer's file spells each id, in the order of ids; an id that stands for nothing is empty."""
        return [self._inner.id_to_token(i) or "" for i in range(self.vocab_size)]

    def to_json(self) -> str:
        """The tokenizer.json of this tokenizer."""
        return self._inner.to_str()


def refuse_names_in_text(end_token: str, special_tokens: Sequence[str]) -> None:
    """A merge that gave the name of a special token would be that token. Merges are spelt in the letters of bytes, and
    stay within a piece of the pattern: in none of those a sign follows a letter.

    Raises:
        UserError: merges may give one of the names.
    """
    letters = set(pre_tokenizers.ByteLevel.alphabet())
    for key, names in {"end_token": (end_token,), "special_tokens": special_tokens}.items():
        for name in names:
            if letters.issuperset(name) and not re.search(rb"\w[^\w\x80-\xff]", byte_level_bytes(name)):
                raise UserError(
                    f"{key} has {name!r}; a name must have a letter or digit with a sign behind it, as {END!r}: text"
                    " could spell any other"
                )


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    *,
    end_token: str = END,
    layout: bool = False,
) -> Tokenizer:
    """Trains a byte-level BPE on texts; the same texts in the same order give the same tokenizer.

    Args:
        texts: training texts only, never held-out ones.
        vocab_size: ids to make: `end_token` is 0, then `special_tokens`, then 256 bytes, then merges. A small corpus
            may give fewer merges.
        special_tokens: further special tokens.
        end_token: name of the document boundary.
        layout: whether tokens stand for the form of texts of :mod:`dsjax.data.layout`.

    Raises:
        UserError: text may spell the name of a special token.
    """
    refuse_names_in_text(end_token, special_tokens)
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LAYOUT_SPLIT if layout else SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_token, *special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=32,  # else rulers of 80 "#" take entries that nothing else can use
        show_progress=False,
    )
    forms = (str(form) for text in texts for form in said([text], Writer(()))) if layout else texts
    inner.train_from_iterator(forms, trainer)
    return Tokenizer(inner, end_token=end_token)


def load_tokenizer(path: str | pathlib.Path, *, end_token: str = END) -> Tokenizer:
    """Loads a tokenizer.json; of a model's whole folder see :func:`dsjax.data.hf_tokenizer.load_hf_tokenizer`.

    Raises:
        UserError: the file is missing, is no tokenizer, has no special token `end_token`, or fails on a sample text.
    """
    path = pathlib.Path(path)
    try:
        if not path.is_file():
            raise UserError(f"tokenizer file {str(path)!r} does not exist")
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise UserError(f"{path}: not a tokenizer.json (it has {size} bytes, more than {MOST_BYTES})")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a tokenizer.json (it is not UTF-8)") from None
    return parse_tokenizer(text, str(path), end_token=end_token)


def _refuse_what_aborts(text: str) -> None:
    """Two mistakes in a tokenizer.json make the library cut a character in the middle, and abort the process.

    A wrong regular expression with a character beyond ASCII is one: it is tried with escapes in their place. The other
    is a merge whose second part lacks the prefix that the model states.
    """
    patterns: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        patterns.extend(value for name, value in pairs if name == "Regex" and isinstance(value, str))
        return dict(pairs)

    try:
        tree = json.loads(text, object_pairs_hook=collect)
    except (ValueError, RecursionError):  # the library says what is wrong
        return
    for pattern in patterns:
        tokenizers.Regex("".join(c if c.isascii() else f"\\x{{{ord(c):x}}}" for c in pattern))
    model = tree.get("model") if isinstance(tree, dict) else None
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    merges = model.get("merges") if isinstance(model, dict) else None
    if isinstance(prefix, str) and prefix and isinstance(merges, list):
        for merge in merges:
            second = merge.split(" ")[-1] if isinstance(merge, str) else merge[-1:] if isinstance(merge, list) else ""
            if not "".join(map(str, second)).startswith(prefix):
                raise ValueError(f"merge {merge!r} lacks the continuing_subword_prefix {prefix!r}")


def parse_tokenizer(text: str, origin: str, *, end_token: str = END) -> Tokenizer:
    """A tokenizer from the text of its tokenizer.json; `origin` names it in errors."""
    with _told_as_user_error(f"{origin}: not a tokenizer.json"):
        _refuse_what_aborts(text)
        inner = tokenizers.Tokenizer.from_str(text)
    try:
        with _told_as_user_error("it can not be used"):
            tokenizer = Tokenizer(inner, end_token=end_token)
            for sample in _SAMPLES:
                tokenizer.decode(tokenizer.encode(sample), skip_special=False)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    return tokenizer
