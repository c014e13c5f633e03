"""Which repositories a folder holds, which of their files are candidates, and what licence their folders have."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import posixpath
from collections.abc import Sequence

import numpy as np

from dsjax.config import UserError
from dsjax.data.build import licenses
from dsjax.data.build.config import BuildConfig
from dsjax.data.corpus import SKIPPED, STDLIB, STDLIB_SKIPPED, missing_path, stdlib_folder, walk

# What lies at the top of a repository, beside files of source.
MARKS = (
    (".git", ".hg", "pyproject.toml", "setup.py", "setup.cfg", "package.json", "Cargo.toml", "go.mod", "Makefile")
    + ("CMakeLists.txt", "README", "README.md", "README.rst", "README.txt")
)  # fmt: skip
_LICENSE_BYTES = 2**18


@dataclasses.dataclass(frozen=True)
class Repository:
    """A folder whose files belong together. ``name`` is its folder's, or "stdlib"."""

    name: str
    folder: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A file with one of the suffixes that are read.

    repository: index of its repository. path: within it, with /. license: of the nearest folder that states one, an
    SPDX expression, or empty. size, changed: in bytes, in nanoseconds; -1 if the file can not be looked at.
    """

    repository: int
    path: str
    license: str
    size: int
    changed: int


def discover(source: str, cfg: BuildConfig) -> list[Repository]:
    """The repositories of SRC, by name.

    Raises:
        UserError: it does not exist, is no folder, or holds none.
    """
    if source == STDLIB:
        return [Repository(STDLIB, stdlib_folder())]
    root = pathlib.Path(source).expanduser()
    if not root.exists():
        raise UserError(missing_path(source, root))
    if not root.is_dir():
        raise UserError(f"{source} is a file; a corpus is built from a folder: a repository, or a folder of them")
    name = root.resolve().name or "root"
    if cfg.repositories == "one" or (cfg.repositories == "auto" and _is_repository(root, cfg.suffixes)):
        return [Repository(name, root)]
    folders = _folders(root)
    if cfg.repositories == "auto":
        folders = [f for folder in folders for f in (_folders(folder) if _is_owner(folder) else [folder])]
    if not folders:
        raise UserError(f"{source} holds no repository: no folder in it, no source file ({', '.join(cfg.suffixes)})")
    return [Repository(folder.relative_to(root).as_posix(), folder) for folder in folders]


def _folders(root: pathlib.Path) -> list[pathlib.Path]:
    inside = (p for p in root.iterdir() if p.is_dir() and not p.is_symlink())
    return sorted(p for p in inside if not p.name.startswith(".") and p.name not in SKIPPED)


def _is_owner(folder: pathlib.Path) -> bool:
    """Whether it is an owner's folder, as in owner/name: nothing but folders, and some of them are repositories."""
    only_folders = all(path.is_dir() and path.name not in MARKS for path in folder.iterdir())
    return only_folders and any(_is_repository(inner, ()) for inner in _folders(folder))


def _is_repository(root: pathlib.Path, suffixes: Sequence[str]) -> bool:
    names = [path.name for path in root.iterdir()]
    return any(n in MARKS or licenses.is_license_file(n) or n.lower().endswith(tuple(suffixes)) for n in names)


def candidates(repositories: Sequence[Repository], cfg: BuildConfig) -> list[Candidate]:
    """Every file that has a suffix to be read, repository by repository, by name.

    Raises:
        UserError: there is none.
    """
    found: list[Candidate] = []
    suffixes = tuple(cfg.suffixes)
    for number, repository in enumerate(repositories):
        is_stdlib = repository.name == STDLIB and repository.folder == stdlib_folder()
        names = walk(repository.folder, SKIPPED | STDLIB_SKIPPED if is_stdlib else SKIPPED)
        stated = _folder_licenses(repository.folder, names)
        if is_stdlib:
            stated.setdefault("", "PSF-2.0")
        for name in names:
            if name.lower().endswith(suffixes):
                size, changed = _look(repository.folder / name)
                found.append(Candidate(number, name, _nearest(stated, name), size, changed))
    if not found:
        shown = ", ".join(r.name for r in repositories[:3]) + (" ..." if len(repositories) > 3 else "")
        raise UserError(
            f"no file of {len(repositories)} repositories ({shown}) ends in one of suffixes, {', '.join(suffixes)}"
        )
    return found


def _look(path: pathlib.Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _folder_licenses(root: pathlib.Path, names: Sequence[str]) -> dict[str, str]:
    """Folder -> the licence that it states; folders that state none are left out."""
    texts: dict[str, dict[str, str]] = {}
    for name in names:
        folder, file = posixpath.split(name)
        if licenses.is_license_file(file) or file == "pyproject.toml":
            try:
                with (root / name).open("rb") as handle:
                    content = handle.read(_LICENSE_BYTES)
            except OSError:
                continue
            texts.setdefault(folder, {})[file] = content.decode("utf-8", errors="replace")
    return {folder: stated for folder, files in texts.items() if (stated := licenses.of_folder(files))}


def _nearest(stated: dict[str, str], path: str) -> str:
    folder = posixpath.dirname(path)
    while folder and folder not in stated:
        folder = posixpath.dirname(folder)
    return stated.get(folder, "")


def content_digest(
    repositories: Sequence[Repository], files: Sequence[Candidate], contents: Sequence[str], tests: np.ndarray
) -> str:
    """What a corpus was made of: SHA-256 over name, licence and content (a digest of it) of every candidate, and over
    the shingles of the test data.
    """
    digest = hashlib.sha256(tests.tobytes())
    for file, content in zip(files, contents, strict=True):
        parts = (repositories[file.repository].name, file.path, file.license, content)
        digest.update("\0".join(parts).encode("utf-8", errors="surrogateescape") + b"\n")
    return digest.hexdigest()
