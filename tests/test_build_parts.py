"""The parts of `dsjax data build`: licences, filters, imports, order."""

from __future__ import annotations

import gzip
import json
import pathlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import UserError
from dsjax.data.build import licenses
from dsjax.data.build.config import PERMISSIVE, Filters
from dsjax.data.build.contamination import shingles_of_tests
from dsjax.data.build.filters import reason_to_drop
from dsjax.data.build.imports import Import, dependencies, imports_of
from dsjax.data.build.order import components, ordered

# ---------------------------------------------------------------- licences

MIT = "Permission is hereby granted, free of charge, to any person obtaining a copy\nof this software ... {}"
NOTICE = "The above copyright notice and this permission notice shall be included"
BSD = "Redistribution and use in source and binary forms, with or without modification, are permitted. {}"
TEXTS = {
    "MIT": MIT.format(NOTICE),
    "MIT-0": MIT.format(""),
    "Apache-2.0": "                Apache License\n          Version 2.0, January 2004",
    "BSD-2-Clause": BSD.format(""),
    "BSD-3-Clause": BSD.format("Neither the name of the copyright holder nor the names of its contributors"),
    "BSD-4-Clause": BSD.format("All advertising materials mentioning features ... Neither the name of"),
    "ISC": "Permission to use, copy, modify, and/or distribute this software for any purpose with or without fee is"
    " hereby granted, provided that the above copyright notice and this permission notice appear in all copies.",
    "0BSD": "Permission to use, copy, modify, and/or distribute this software for any purpose with or without fee is"
    " hereby granted.",
    "GPL-3.0-only": "The GNU General Public License is a free, copyleft license for software and other kinds of works."
    " ... GNU Affero General Public License ... GNU Lesser General Public License",
    "GPL-2.0-only": "GNU GENERAL PUBLIC LICENSE\n   Version 2, June 1991\n ... GNU Library General Public License",
    "LGPL-2.1-only": "GNU LESSER GENERAL PUBLIC LICENSE\n   Version 2.1, February 1999",
    "AGPL-3.0-only": "The GNU Affero General Public License is a free, copyleft license for software",
    "Unlicense": "This is free and unencumbered software released into the public domain.",
    "CC0-1.0": "CC0 1.0 Universal",
    "MPL-2.0": "Mozilla Public License Version 2.0",
    "PSF-2.0": "A. HISTORY OF THE SOFTWARE\nPYTHON SOFTWARE FOUNDATION LICENSE VERSION 2\n" + BSD.format(""),
    "MIT AND PSF-2.0": MIT.format(NOTICE) + "\nPYTHON SOFTWARE FOUNDATION LICENSE VERSION 2\n",
    "LicenseRef-Commons-Clause AND MIT": MIT.format(NOTICE) + "“Commons Clause” License Condition v1.0",
    "BSD-3-Clause AND GPL-3.0-only": BSD.format("Neither the name of x")
    + "The GNU General Public License is a free, copyleft license for software",
    "LGPL-2.1-or-later": "under the terms of the GNU Lesser General Public License as published by the Free Software"
    " Foundation; either version 2.1 of the License",
    "unknown": "All rights reserved.",
}


@pytest.mark.parametrize("expected", TEXTS)
def test_a_licence_is_known_by_its_sentences(expected: str) -> None:
    assert licenses.detect(TEXTS[expected]) == expected
    assert licenses.detect(TEXTS[expected].upper().replace(" ", "\n  ")) == expected


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("mit", True),
        ("GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("MIT AND GPL-3.0-only", False),
        ("(MIT OR GPL-2.0-only) AND Apache-2.0", True),
        ("GPL-2.0-only AND (MIT OR Apache-2.0)", False),
        ("MIT OR GPL-2.0-only AND GPL-3.0-only", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
        ("Apache-2.0+", True),
        ("MIT OR", False),
        ("(MIT", False),
        ("MIT)", False),
        ("AND", False),
        ("", False),
        ("MIT, see the file", False),
        ("Apache-2.0 WITH", False),
        ("(" * 20000 + "MIT", False),
    ],
)
def test_expressions(expression: str, allowed: bool) -> None:
    assert licenses.permitted(expression, PERMISSIVE) is allowed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# SPDX-License-Identifier: MIT\n", "MIT"),
        ("#!/usr/bin/env python\n# SPDX-License-Identifier: Apache-2.0 OR MIT\n", "Apache-2.0 OR MIT"),
        ("/* SPDX-License-Identifier: GPL-2.0-only */\n", "GPL-2.0-only"),
        ("<!-- SPDX-License-Identifier: MIT -->", "MIT"),
        ("# SPDX-License-Identifier: NOASSERTION\n", "unknown"),
        ("x = 'SPDX-License-Identifier: GPL-3.0-only'\n", ""),
        ('HEADER = re.compile("SPDX-License-Identifier: (.*)")\n', ""),
        ("\n" * 60 + "# SPDX-License-Identifier: GPL-3.0-only\n", ""),
        (
            "# This program is free software: you can redistribute it and/or modify it\n# under the terms of the GNU"
            " General Public License as published by\n# the Free Software Foundation, either version 3 of it\n",
            "GPL-3.0-or-later",
        ),
        ("# Permission is hereby granted, free of charge, to any person\n", ""),
    ],
)
def test_headers(text: str, expected: str) -> None:
    assert licenses.header(text) == expected


def test_a_folder_says_its_licence() -> None:
    mit, gpl, apache = TEXTS["MIT"], TEXTS["GPL-3.0-only"], TEXTS["Apache-2.0"]
    assert licenses.of_folder({"LICENSE": mit}) == "MIT"
    assert licenses.of_folder({"LICENSE.txt": mit, "COPYING": gpl}) == "GPL-3.0-only AND MIT"
    assert licenses.of_folder({"LICENSE-MIT": mit, "LICENSE-APACHE": apache}) == "Apache-2.0 OR MIT"
    assert licenses.of_folder({"LICENSE": "see elsewhere"}) == "unknown"
    assert licenses.of_folder({"pyproject.toml": '[project]\nlicense = "Apache-2.0"\n'}) == "Apache-2.0"
    assert licenses.of_folder({"pyproject.toml": '[project]\nlicense = {text = "MIT License"}\n'}) == "MIT"
    assert licenses.of_folder({"pyproject.toml": "[project\n"}) == ""
    assert licenses.of_folder({}) == ""
    for name in ("LICENSE", "licence.md", "COPYING.LESSER", "LICENSE-MIT", "UNLICENSE", "License.rst"):
        assert licenses.is_license_file(name)
    for name in ("license.py", "licenses", "mylicense", "LICENSEE", "copyingmachine.txt"):
        assert not licenses.is_license_file(name)


# ---------------------------------------------------------------- filters

GOOD = "def add(first, second):\n    return first + second\n"


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("a.py", GOOD, ""),
        ("a.py", "x = 1\n", "too short"),
        ("a.min.js", GOOD, "minified"),
        ("a.py", GOOD + "# " + "words and words " * 70 + "\n", "long line"),
        ("a.py", ("value = '" + "some words " * 12 + "'\n") * 5, "long lines"),
        ("a.py", "x = [" + "1, 22, 333,\n" * 40 + "]\n", "few letters"),
        ("a.py", "# This file was automatically generated by a tool\n" + GOOD, "generated"),
        ("a.py", '"""x"""\n# Code generated by mockgen. DO NOT EDIT.\n' + GOOD, "generated"),
        ("a.py", GOOD * 4 + "# generated by hand\n", ""),
        (
            "a.py",
            "data = '''\n" + ("QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWZnaGlqa2xtbm9wcXJzdHV2\n" * 20) + "'''\n",
            "encoded data",
        ),
        (
            "a.py",
            "data = [\n" + "    0xAB, 0xCD, 0xEF, 0xFA, 0xCE, 0xBE, 0xEF, 0xDE, 0xAD, 0xFF,\n" * 20 + "]\n",
            "encoded data",
        ),
        ("a.py", "word\n" * 400, ""),
        ("a.json", '{"short": "a text"}', "data"),
        ("a.json", '{"long": "' + "a text\\n" * 10 + '"}', ""),
        ("a.yaml", "key: some text\n" * 400, "data"),
        ("a.html", "<html><script>" + "var x;\n" * 40 + "</script><b>few</b></html>", "data"),
        ("a.html", "<html><b>" + "many words here\n" * 20 + "</b></html>", ""),
        ("a.txt", '<?xml version="1.0"?>\n<some>text here</some>', "data"),
        ("a.py", "def f(:\n    pass and more\n", "does not parse"),
        ("a.py", "text = 'a nul \0 inside'\n", "does not parse"),
        ("a.py", "print 'Python 2 and more'\n", "does not parse"),
        ("a.txt", "def f(:\n    pass and more\n", ""),
        ("a.py", "pattern = '\\d is no escape'\n", ""),
        ("a.py", "x = " + "(" * 900 + "\n", "long lines"),
        ("a.py", "abcdefghijklmnop = " + "-" * 5 + "(" * 950 + "abcdefghij" * 40 + "\n", "long line"),
    ],
)
def test_filters(name: str, text: str, rule: str) -> None:
    assert reason_to_drop(name, text, Filters())[0] == rule


def test_filters_can_be_turned_off() -> None:
    off = Filters(
        min_chars=0,
        max_line_length=0,
        max_mean_line_length=0,
        min_letters=0.0,
        max_encoded=0.0,
        generated="keep",
        unparsed="keep",
    )
    for text in ("x", "1" * 5000, "# automatically generated\n", "def f(:\n"):
        assert reason_to_drop("a.py", text, off) == ("", "")


# ---------------------------------------------------------------- test data, names


def test_test_data_that_can_not_be_read_is_told(tmp_path: pathlib.Path) -> None:
    damaged = bytearray(gzip.compress(bytes(range(256))))
    damaged[12:40] = damaged[12:40][::-1]
    for name, content, said in (
        ("tests.jsonl.gz", damaged, "can not be read"),
        ("tests.jsonl", b"[" * 100_000, "is not JSON"),
        ("tests.jsonl", rb'{"a": "\ud800"}', "holds no text of 10 tokens"),
        ("tests.jsonl", b'{"a":' * 900 + b"1" + b"}" * 900, "holds no text of 10 tokens"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=said):
            shingles_of_tests([str(tmp_path / name)])
    (tmp_path / name).write_text(json.dumps(" ".join(map(str, range(9))) + " \ud800"))
    assert shingles_of_tests([str(tmp_path / name)]).size == 1


def test_of_the_bytes_of_a_name_the_same_is_drawn_as_of_the_name() -> None:
    name = "7/repository/café.py"
    assert random.Random(name).random() == random.Random(name.encode("utf-8", "surrogateescape")).random()


# ---------------------------------------------------------------- imports and order


def edges(files: dict[str, str]) -> dict[str, set[str]]:
    found = dependencies({path: imports_of(path, text) for path, text in files.items()})
    return {path: set(targets) for path, targets in found.items() if targets}


def test_imports_of_every_form() -> None:
    text = (
        "import a.b, c as d\nfrom . import e\nfrom ..f import g as h, i\nfrom j import *\n"
        "if TYPE_CHECKING:\n    import k\nelse:\n    import l\n"
        "try:\n    import m\nexcept ImportError:\n    m = None\n"
        "def function():\n    import n\nclass C:\n    import o\n"
    )
    found = imports_of("x.py", text)
    assert Import("a.b") in found
    assert Import("c") in found
    assert Import("", 1, ("e",)) in found
    assert Import("f", 2, ("g", "i")) in found
    assert Import("j", 0, ("*",)) in found
    assert Import("k", weak=True) in found
    assert Import("l") in found
    assert Import("m") in found
    assert Import("n", weak=True) in found
    assert Import("o") in found
    assert len(found) == 10
    broken = "import a.b, c as d\nfrom ..f import (g as h, i)  # x\nprint 'two'\n"
    assert imports_of("x.py", broken) == [Import("a.b"), Import("c"), Import("f", 2, ("g", "i"))]
    assert imports_of("x.c", '#include <stdio.h>\n# include "a/b.h"\n') == [Import("a/b.h")]
    assert imports_of("x.ts", "import {a} from './a'\nconst b = require('../b.js')\nimport 'left-pad'\n") == [
        Import("./a"),
        Import("../b.js"),
    ]
    assert imports_of("x.md", "import a") == []


def test_imports_are_resolved_inside_the_repository() -> None:
    assert edges(
        {
            "pkg/__init__.py": "from .a import f",
            "pkg/a.py": "from pkg import b\nimport os, json",
            "pkg/b.py": "from . import sub\nfrom .sub.c import g",
            "pkg/sub/__init__.py": "",
            "pkg/sub/c.py": "from ..d import h\nfrom ... import nothing\nfrom .... import above",
            "pkg/d.py": "import pkg.sub.c",
            "tests/test_a.py": "import pkg.a\nfrom helper import x\nimport run",
            "tests/helper.py": "",
            "scripts/run.py": "import helper",
        }
    ) == {
        "pkg/__init__.py": {"pkg/a.py"},
        "pkg/a.py": {"pkg/b.py"},
        "pkg/b.py": {"pkg/sub/__init__.py", "pkg/sub/c.py"},
        "pkg/sub/c.py": {"pkg/d.py"},
        "pkg/d.py": {"pkg/sub/c.py"},
        "tests/test_a.py": {"pkg/a.py", "tests/helper.py"},
    }


def test_source_folders_namespaces_and_other_languages() -> None:
    assert edges(
        {
            "src/one/__init__.py": "import two.deep.x",
            "two/deep/x.py": "from one import name\nimport lib_mod",
            "lib/lib_mod.py": "",
            "packages/three/three/__init__.py": "",
            "packages/three/three/m.py": "from three import missing\nfrom three.m import itself",
            "main.py": "import three.m, one",
        }
    ) == {
        "src/one/__init__.py": {"two/deep/x.py"},
        "two/deep/x.py": {"src/one/__init__.py", "lib/lib_mod.py"},
        "packages/three/three/m.py": {"packages/three/three/__init__.py"},
        "main.py": {"packages/three/three/m.py", "src/one/__init__.py"},
    }
    assert edges({"a.c": '#include "x.h"\n#include "sub/y.h"', "include/x.h": "", "sub/y.h": '#include "../a.c"'}) == {
        "a.c": {"include/x.h", "sub/y.h"},
        "sub/y.h": {"a.c"},
    }
    assert edges({"a/m.ts": "import x from './n'\nimport y from '../b'", "a/n.tsx": "", "b/index.js": ""}) == {
        "a/m.ts": {"a/n.tsx", "b/index.js"}
    }


GRAPHS = st.dictionaries(
    st.sampled_from("abcdefgh"), st.dictionaries(st.sampled_from("abcdefgh"), st.booleans(), max_size=4), max_size=8
).map(
    lambda g: {a: {b: w for b, w in g.get(a, {}).items() if b != a} for a in {*g, *(b for n in g.values() for b in n)}}
)


def reached(graph: dict[str, dict[str, bool]], start: str) -> set[str]:
    found, waiting = set(), [start]
    while waiting:
        for other in graph[waiting.pop()]:
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found


@settings(max_examples=300, deadline=None)
@given(GRAPHS, st.randoms(use_true_random=False))
def test_what_is_needed_comes_first_unless_it_needs_back(graph, rng) -> None:
    order = ordered(graph)
    assert sorted(order) == sorted(graph)
    place = {name: i for i, name in enumerate(order)}
    for name in graph:
        for other in graph[name]:
            if name not in reached(graph, other):
                assert place[other] < place[name]
    groups = components(graph, graph)
    assert all((a in reached(graph, b) and b in reached(graph, a)) for g in groups for a in g for b in g if a != b)
    assert sorted(n for g in groups for n in g) == sorted(graph)
    # imports that do not bind never decide between two that need each other only through them
    binding = {a: {b: True for b, w in targets.items() if w} for a, targets in graph.items()}
    for name in graph:
        for other in binding[name]:
            if name not in reached(binding, other) and other in reached(graph, name) and name in reached(graph, other):
                assert place[other] < place[name]
    shuffled = list(graph)
    rng.shuffle(shuffled)
    assert ordered({a: dict(reversed(graph[a].items())) for a in shuffled}) == order


def test_a_cycle_begins_at_the_file_that_needs_least() -> None:
    graph = {"a": {"b": True, "c": True}, "b": {"c": True}, "c": {"a": True}}
    assert ordered(graph) == ["b", "a", "c"] or ordered(graph)[0] in ("b", "c")
    assert ordered(graph)[0] == "b"
    deep = {f"{i:05d}": {f"{i + 1:05d}": True} for i in range(20000)} | {"20000": {}}
    assert ordered(deep) == sorted(deep, reverse=True)
