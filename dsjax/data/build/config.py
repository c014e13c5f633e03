"""What ``dsjax data build`` does with a folder of repositories: one frozen dataclass for each stage."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from dsjax.config import Bounds, NonNegativeInt, PositiveInt, Seed, Share, UserError
from dsjax.data.build.fim import Fim
from dsjax.data.records import RECORD_SUFFIXES

# What is permissive: the short list of what The Stack (Kocetkov et al. 2022) and the Blue Oak Council call so.
PERMISSIVE = (
    ("MIT", "MIT-0", "X11", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSD-1-Clause", "0BSD", "ISC", "Zlib")
    + ("BSL-1.0", "Unlicense", "CC0-1.0", "PSF-2.0", "Python-2.0", "PostgreSQL", "NCSA", "WTFPL", "HPND")
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Licenses:
    """Which licences a file may have.

    allow: SPDX ids; of an expression such as ``MIT OR GPL-2.0-only`` one side must be allowed, of an AND both. Empty:
        every licence.
    unknown: what becomes of files for which no licence, or none that is recognised, is found.
    """

    allow: tuple[str, ...] = PERMISSIVE
    unknown: Literal["keep", "drop"] = "keep"


@dataclasses.dataclass(frozen=True)
class Filters:
    """What a file must look like; docs/corpus.md names the paper that each comes from. Zero turns a limit off.

    max_bytes: of a file on the disk; a larger one is not read.
    min_chars: characters of a file, without the white space around it.
    max_line_length, max_mean_line_length: characters.
    min_letters: share of letters among all characters.
    max_encoded: share of characters in runs of base64, hexadecimal digits or numeric escapes; and any such run longer
        than 1,024 characters.
    generated: what becomes of files that say in their first lines that a program wrote them.
    unparsed: what becomes of Python files that this Python does not parse.
    """

    max_bytes: NonNegativeInt = 2**20
    min_chars: NonNegativeInt = 10
    max_line_length: NonNegativeInt = 1000
    max_mean_line_length: NonNegativeInt = 100
    min_letters: Share = 0.25
    max_encoded: Share = 0.5
    generated: Literal["keep", "drop"] = "drop"
    unparsed: Literal["keep", "drop"] = "drop"


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Which copies are dropped.

    level: "file" compares files over all repositories. "repository" compares whole repositories, so that none loses
        some of its files (DeepSeek-Coder, section 2.3); "none" compares nothing.
    threshold: Jaccard similarity of token 5-grams from which one of two is dropped; 1 drops exact copies only.
    """

    level: Literal["file", "repository", "none"] = "file"
    threshold: Annotated[float, Bounds(gt=0, le=1)] = 0.7


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """A corpus.

    repositories: "one": SRC is one repository; "folders": each folder in it is one; "auto": one if SRC holds what a
        repository begins with (see `dsjax.data.build.repositories.MARKS`) or a source file, else its folders.
    suffixes: which files are read.
    decontaminate: files with test data, such as HumanEval.jsonl; what shares ten tokens in a row with them is dropped.
    order: "imports" puts what a file imports in front of it; "path" sorts by name.
    document: what becomes a document: a "repository" (its files one after another, up to `max_document_bytes`), or
        each "file".
    max_document_bytes: a document is closed before a file that would make it longer; one file may be.
    path_comments: a comment with its path leads each file.
    pairs: also write functions as pairs of signature with docstring, and body.
    shard_bytes: text in one output file, about; also the unit of work that a killed build loses at the most.
    seed: of fill-in-the-middle.
    """

    repositories: Literal["auto", "one", "folders"] = "auto"
    suffixes: tuple[str, ...] = (".py",)
    licenses: Licenses = Licenses()
    filters: Filters = Filters()
    duplicates: Duplicates = Duplicates()
    decontaminate: tuple[str, ...] = ()
    order: Literal["imports", "path"] = "imports"
    document: Literal["repository", "file"] = "repository"
    max_document_bytes: PositiveInt = 2**16
    path_comments: bool = True
    fim: Fim = Fim()
    pairs: bool = True
    shard_bytes: PositiveInt = 2**24
    seed: Seed = 0

    def validate(self) -> None:
        """What annotations cannot say.

        Raises:
            UserError: names the key.
        """
        wrong = [s for s in self.suffixes if not s.startswith(".") or s.lower() in RECORD_SUFFIXES or s != s.lower()]
        if wrong or not self.suffixes:
            raise UserError(
                f"suffixes is {self.suffixes!r}; it must be a list of suffixes of text files in lower case, such as .py"
            )
