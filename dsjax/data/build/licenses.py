"""Which licence a file has: an SPDX header of its own, else the licence file of the nearest folder above it.

What is found is an SPDX expression; a text that no rule knows is "unknown". Rules look for sentences that only that
licence has; a text with several licences is all of them, joined by AND, so that the strictest decides.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Iterable, Mapping

UNKNOWN = "unknown"
HEADER_LINES = 40  # an SPDX header or a notice stands in front of the code

# A folder's licence is in files of these names, with any ending: LICENSE, LICENCE.txt, COPYING.LESSER, LICENSE-MIT.
_FILE = re.compile(r"(?:un)?licen[sc]e(?:[-._ ].*)?|copying(?:[-._ ].*)?", re.IGNORECASE)
_CODE = re.compile(r".*\.(?:py|pyi|js|ts|c|h|cc|cpp|go|rs|java|rb|sh|json)", re.IGNORECASE)  # license.py is a program
_HEADER = re.compile(r"^[^\w\"'\n]*SPDX-License-Identifier:[ \t]*([^\r\n]+)", re.MULTILINE)
# What pyproject.toml files say instead of an SPDX id.
_ALIASES = {
    "mit license": "MIT",
    "the mit license": "MIT",
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "gplv3": "GPL-3.0-only",
    "gpl": "GPL-1.0-or-later",
}

# SPDX id -> sentences, all of which its text holds (white space folded, lower case).
_SENTENCES: Mapping[str, tuple[str, ...]] = {
    "Apache-2.0": ("apache license", "version 2.0"),
    "BSL-1.0": ("boost software license - version 1.0",),
    "MPL-2.0": ("mozilla public license", "2.0"),
    "EPL-2.0": ("eclipse public license - v 2.0",),
    "CC0-1.0": ("cc0 1.0 universal",),
    "Unlicense": ("free and unencumbered software released into the public domain",),
    "WTFPL": ("do what the fuck you want to public license",),
    "Zlib": ("provided 'as-is', without any express or implied warranty", "altered source versions must be plainly"),
    "PSF-2.0": ("python software foundation license version 2",),
    "GPL-3.0-only": ("the gnu general public license is a free, copyleft license for software",),
    "AGPL-3.0-only": ("the gnu affero general public license is a free, copyleft license for software",),
    "LGPL-3.0-only": ("this version of the gnu lesser general public license incorporates the terms",),
    "LGPL-2.1-only": ("gnu lesser general public license version 2.1, february 1999",),
    "LGPL-2.0-only": ("gnu library general public license version 2, june 1991",),
    "GPL-2.0-only": ("gnu general public license version 2, june 1991",),
    "LicenseRef-Commons-Clause": ("commons clause",),
    "CC-BY-NC-4.0": ("attribution-noncommercial 4.0 international",),
    "CC-BY-NC-SA-4.0": ("attribution-noncommercial-sharealike 4.0 international",),
}
_MIT = "permission is hereby granted, free of charge, to any person obtaining a copy of this software"
_MIT_NOTICE = "this permission notice"
_ISC = re.compile(r"permission to use, copy, modify,? and(?:/or)? distribute this software for any purpose")
_BSD = "redistribution and use in source and binary forms"
# "... under the terms of the GNU Lesser General Public License ... version 2.1": notices in source files.
_GNU = re.compile(
    r"under the terms of (?:version \d[\d.]* of )?the gnu (affero |lesser |library )?general public license"
)
_GNU_VERSION = re.compile(r"version (\d(?:\.\d)?)")
_GNU_NAMES = {"affero ": "AGPL", "lesser ": "LGPL", "library ": "LGPL", None: "GPL"}


def is_license_file(name: str) -> bool:
    """Whether a file of this name states the licence of its folder."""
    return bool(_FILE.fullmatch(name)) and not _CODE.fullmatch(name)


def detect(text: str) -> str:
    """The SPDX expression of a licence's text, or "unknown"."""
    folded = " ".join(re.sub(r"[“”‘’`]", "'", text).lower().split())
    found = {name for name, sentences in _SENTENCES.items() if all(s in folded for s in sentences)}
    if _MIT in folded:
        found.add("MIT" if _MIT_NOTICE in folded else "MIT-0")
    if match := _ISC.search(folded):
        found.add("ISC" if "provided that the above copyright notice" in folded[match.end() :] else "0BSD")
    if _BSD in folded:
        advertises = "advertising materials mentioning" in folded
        named = "neither the name" in folded or "endorse or promote products" in folded
        found.add("BSD-4-Clause" if advertises else "BSD-3-Clause" if named else "BSD-2-Clause")
    if not any("GPL" in name for name in found):
        found |= set(_notices(folded))
    # CPython's own file, which goes on with the licences of its history and of what it has from others.
    if "PSF-2.0" in found and folded.startswith("a. history of the software"):
        found = {"PSF-2.0"}
    return _all_of(found)


def _notices(folded: str) -> Iterable[str]:
    for match in _GNU.finditer(folded):
        version = _GNU_VERSION.search(folded, match.start(), match.end() + 200)
        number = version[1] if version else ""
        number += ".0" if number and "." not in number else ""
        yield f"{_GNU_NAMES[match[1]]}-{number}-or-later" if number else f"{_GNU_NAMES[match[1]]}-1.0-or-later"


def _all_of(names: Iterable[str]) -> str:
    return " AND ".join(sorted(set(names))) or UNKNOWN


def header(text: str) -> str:
    """The licence that a source file states in its first lines; empty if it states none.

    An SPDX identifier decides. A notice of a GNU licence counts too; other sentences do not, since programs about
    licences quote them.
    """
    head = "\n".join(text.split("\n", HEADER_LINES)[:HEADER_LINES])
    if found := _HEADER.search(head):
        stated = re.sub(r"\s*(?:\*/|-->|#}|\"\"\"|''').*$", "", found[1]).strip()
        return UNKNOWN if stated in ("", "NONE", "NOASSERTION") else stated
    plain = " ".join(re.sub(r"(?m)^[\s#*/;]+", " ", head).lower().split())
    notices = set(_notices(plain))
    return _all_of(notices) if notices else ""


def declared(name: str, text: str) -> str:
    """The licence that a project's metadata state: pyproject.toml (PEP 621, PEP 639). Empty if none."""
    if name != "pyproject.toml":
        return ""
    try:
        project = tomllib.loads(text).get("project", {})
    except tomllib.TOMLDecodeError:
        return ""
    stated = project.get("license", "") if isinstance(project, dict) else ""
    if isinstance(stated, dict):
        stated = stated.get("text", "")
    if not isinstance(stated, str) or not stated.strip():
        return ""
    stated = _ALIASES.get(stated.strip().lower(), stated.strip())
    return stated if _parsed(stated) is not None else detect(stated)


def of_folder(texts: Mapping[str, str]) -> str:
    """The licence of a folder by its licence files (name -> text), and its pyproject.toml where there is none."""
    files = {name: detect(text) for name, text in texts.items() if is_license_file(name)}
    if files:
        known = {part for found in files.values() if found != UNKNOWN for part in found.split(" AND ")}
        # Rust's custom: one file for each of the licences that one may choose from.
        dual = len(files) > 1 and all(re.match(r"licen[sc]e[-_.](mit|apache)", name.lower()) for name in files)
        return " OR ".join(sorted(known)) if dual and known else _all_of(known)
    stated = [found for name, text in texts.items() if (found := declared(name, text))]
    return stated[0] if stated else ""


# ---------------------------------------------------------------- expressions

_WORD = re.compile(r"\s*([()]|[A-Za-z0-9][A-Za-z0-9.+:-]*)")


def permitted(expression: str, allow: Iterable[str]) -> bool:
    """Whether an SPDX expression can be satisfied with the licences in ``allow``; case does not matter.

    ``WITH`` adds permissions, so the licence in front of it decides. What is no expression is not permitted.
    """
    tree = _parsed(expression)
    return tree is not None and _holds(tree, frozenset(name.lower() for name in allow))


@functools.lru_cache(maxsize=1024)
def _parsed(expression: str) -> tuple | str | None:
    words, at = [], 0
    while at < len(expression.rstrip()):
        match = _WORD.match(expression, at)
        if match is None:
            return None
        words.append(match[1])
        at = match.end()
    try:
        tree, rest = _any(words)
    except (IndexError, ValueError, RecursionError):
        return None
    return None if rest else tree


def _any(words: list[str]) -> tuple[tuple | str, list[str]]:
    left, words = _every(words)
    while words and words[0].upper() == "OR":
        right, words = _every(words[1:])
        left = ("or", left, right)
    return left, words


def _every(words: list[str]) -> tuple[tuple | str, list[str]]:
    left, words = _one(words)
    while words and words[0].upper() == "AND":
        right, words = _one(words[1:])
        left = ("and", left, right)
    return left, words


def _one(words: list[str]) -> tuple[tuple | str, list[str]]:
    if words[0] == "(":
        inner, rest = _any(words[1:])
        if rest[0] != ")":
            raise ValueError("a bracket is open")
        return inner, rest[1:]
    if words[0] == ")" or words[0].upper() in ("AND", "OR", "WITH"):
        raise ValueError("a licence is missing")
    name, words = words[0].removesuffix("+"), words[1:]
    if words and words[0].upper() == "WITH":
        if len(words) < 2:
            raise ValueError("an exception is missing")
        words = words[2:]
    return name, words


def _holds(tree: tuple | str, allow: frozenset[str]) -> bool:
    if isinstance(tree, str):
        return tree.lower() in allow
    kind, left, right = tree
    test = all if kind == "and" else any
    return test(_holds(side, allow) for side in (left, right))
