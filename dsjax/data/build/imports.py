"""What a file imports, and which files of its repository that is.

Python is read by its own parser (files that do not parse, line by line); C and JavaScript by the one line that names
another file. What is not in the repository is of no interest here.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from dsjax.data.build.syntax import parsed

_PYTHON = (".py", ".pyi")
_INITS = ("__init__.py", "__init__.pyi")
_C = (".c", ".h", ".cc", ".cpp", ".hpp", ".cu")
_SCRIPT = (".js", ".jsx", ".ts", ".tsx", ".mjs")
# Where a statement holds others, the last first.
_PARTS = ("finalbody", "orelse", "handlers", "cases", "body")
_LINE = re.compile(r"^[ \t]*(?:from[ \t]+([.\w]+)[ \t]+import[ \t]+(.+)|import[ \t]+(.+))", re.MULTILINE)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"\n]+)"', re.MULTILINE)
_REQUIRE = re.compile(r"""(?:\bfrom|\bimport|\brequire\s*\(|\bimport\s*\()\s*['"](\.{1,2}/[^'"\n]+)['"]""")
SOURCE_FOLDERS = ("", "src", "lib", "python")  # where packages lie in a repository


class Import(NamedTuple):
    """One import.

    module: dotted in Python, without leading dots; a path elsewhere.
    level: leading dots.
    names: what is taken from the module, "*" included; empty for a plain import, and elsewhere.
    weak: it happens inside a function, or for type checkers only; such imports often close a cycle, and do not bind.
    """

    module: str
    level: int = 0
    names: tuple[str, ...] = ()
    weak: bool = False


def imports_of(name: str, text: str) -> list[Import]:
    """What a file imports, in order, each once."""
    suffix = posixpath.splitext(name)[1].lower()
    if suffix in _PYTHON:
        found = _python(text)
    elif suffix in _C:
        found = (Import(match[1]) for match in _INCLUDE.finditer(text))
    elif suffix in _SCRIPT:
        found = (Import(match[1]) for match in _REQUIRE.finditer(text))
    else:
        return []
    return list(dict.fromkeys(found))


def _python(text: str) -> Iterator[Import]:
    tree = parsed(text)
    if isinstance(tree, str):
        yield from _lines(text)
        return
    nodes: list[tuple[ast.AST, bool]] = [(tree, False)]
    while nodes:
        node, weak = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, weak=weak) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield Import(node.module or "", node.level, tuple(alias.name for alias in node.names), weak)
        elif isinstance(node, ast.If) and _for_types_only(node.test):
            nodes += [(child, weak) for child in reversed(node.orelse)] + [
                (child, True) for child in reversed(node.body)
            ]
        else:
            inside = weak or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            nodes += [(child, inside) for part in _PARTS for child in reversed(getattr(node, part, ()))]


def _for_types_only(test: ast.expr) -> bool:
    name = test.id if isinstance(test, ast.Name) else test.attr if isinstance(test, ast.Attribute) else ""
    return name == "TYPE_CHECKING"


def _lines(text: str) -> Iterator[Import]:
    for match in _LINE.finditer(text):
        base, names, plain = match.groups()
        if plain:
            yield from (Import(part.split()[0].strip(",;")) for part in plain.split("#")[0].split(",") if part.strip())
        else:
            level = len(base) - len(base.lstrip("."))
            taken = (part.split() for part in names.split("#")[0].strip("()\\ \t").split(","))
            yield Import(base.lstrip("."), level, tuple(part[0] for part in taken if part))


# ---------------------------------------------------------------- resolution


def dependencies(files: Mapping[str, Iterable[Import]]) -> dict[str, dict[str, bool]]:
    """Which files of a repository each file needs: path -> {path: whether the import binds}, never itself.

    An absolute import of Python's is looked for in the folder that the file's own package lies in (beside the file, if
    it is in none), in the usual source folders, and in the folders that hold packages. So in a folder of scripts,
    each for itself, none sees those of another folder.

    Args:
        files: path in the repository (with /) -> its imports.
    """
    packages = {posixpath.dirname(path) for path in files if posixpath.basename(path) in _INITS}
    roots = sorted({_root(package, packages) for package in packages})
    needs: dict[str, dict[str, bool]] = {}
    for path, imports in files.items():
        needs[path] = {}
        own = _root(posixpath.dirname(path), packages)
        for item in imports:
            for target in _targets(path, item, files, (own, *SOURCE_FOLDERS, *roots)):
                if target != path:
                    needs[path][target] = needs[path].get(target, False) or not item.weak
    return needs


def _root(folder: str, packages: set[str]) -> str:
    """The folder above all packages that a folder is part of: what Python would have on its path."""
    while folder in packages and folder:
        folder = posixpath.dirname(folder)
    return folder


def _targets(path: str, item: Import, files: Mapping[str, object], roots: Iterable[str]) -> list[str]:
    suffix, folder = posixpath.splitext(path)[1].lower(), posixpath.dirname(path)
    if suffix in _C:
        return _first((posixpath.join(base, item.module) for base in (folder, "", "include", "src")), files)
    if suffix in _SCRIPT:
        place = posixpath.join(folder, item.module)
        return _first((place + ending for ending in ("", *_SCRIPT, *(f"/index{s}" for s in _SCRIPT))), files)
    if item.level:
        for _ in range(item.level - 1):
            if not folder:
                return []  # above the repository
            folder = posixpath.dirname(folder)
        roots = (folder,)
    for root in dict.fromkeys(roots):
        if not item.names:
            found = _module(root, item.module, files)
        else:
            inner = [_module(root, f"{item.module}.{name}", files) for name in item.names]
            found = [hit for hits in inner for hit in hits]
            if not all(inner):  # some names, or "*", are in the module itself
                found = _module(root, item.module, files) + found
        if found:
            return found
    return []


def _module(root: str, dotted: str, files: Mapping[str, object]) -> list[str]:
    """The file of a module below a folder, a package before a module as in Python; none if it is not there."""
    place = posixpath.join(root, *[part for part in dotted.split(".") if part])
    endings = [*(f"/{name}" for name in _INITS), *_PYTHON] if place else _INITS
    return _first((place + ending for ending in endings), files)


def _first(candidates: Iterable[str], files: Mapping[str, object]) -> list[str]:
    """The first of some paths that is a file."""
    return next(([path] for path in map(posixpath.normpath, candidates) if path in files), [])
