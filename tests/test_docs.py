"""What can be checked of the documents: commands parse, links lead somewhere, names exist, the table is current."""

from __future__ import annotations

import ast
import functools
import importlib
import pathlib
import re
import shlex
import shutil

import pytest

from dsjax import cli, sharding_table
from dsjax.config import apply_overrides, load_config, validate

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def fenced(page: pathlib.Path, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def commands(page: pathlib.Path) -> list[list[str]]:
    """The words of every command in shell blocks, comments and environment left out."""
    found = []
    for block in fenced(page, "bash"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            while words and (words[0] == "time" or re.fullmatch(r"[A-Z_]+=.*", words[0])):
                words = words[1:]
            if words:
                found.append(words)
    return found


def dsjax_commands() -> list[list[str]]:
    """Those of the pages, and of the first lines of configs."""
    found = [words for page in PAGES for words in commands(page)]
    for path in sorted((ROOT / "configs").rglob("*.py")):
        page = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found += [shlex.split(line) for line in re.findall(r"^    (dsjax .*)$", page, re.MULTILINE)]
    return [list(words[1:]) for words in dict.fromkeys(map(tuple, found)) if words[0] == "dsjax"]


@pytest.fixture
def examples(tmp_path: pathlib.Path) -> pathlib.Path:
    """configs/ with the configs that the documents write out beside its own."""
    folder = tmp_path / "configs"
    shutil.copytree(ROOT / "configs", folder, ignore=shutil.ignore_patterns("__pycache__"))
    for page in PAGES:
        for block in fenced(page, "python"):
            named = re.match(r'"""configs/(\w+\.py)', block)
            if named:
                (folder / named[1]).write_text(block, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("words", dsjax_commands(), ids=" ".join)
def test_a_documented_command_parses(words: list[str], monkeypatch: pytest.MonkeyPatch, examples: pathlib.Path) -> None:
    called = []
    for name in ("train", "evaluate", "generate", "plan", "kernels", "inspect", "convert", "data"):
        function = getattr(cli, name)

        def record(*args, function=function, **options) -> int:
            called.append((function.__name__, args, options))
            return 0

        monkeypatch.setattr(cli, name, functools.wraps(function)(record))
    monkeypatch.chdir(examples)
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 0
    if words[0] == "train":
        _, (config, overrides), _ = called[0]
        validate(apply_overrides(load_config(config), overrides))


def test_commands_are_found() -> None:
    assert {words[0] for words in dsjax_commands()} >= {"train", "eval", "generate", "inspect"}


def test_configs_that_the_documents_write_out_load(examples: pathlib.Path) -> None:
    written = {p.name for p in (examples / "configs").glob("*.py")} - {p.name for p in (ROOT / "configs").glob("*.py")}
    assert written
    for name in written:
        validate(load_config(examples / "configs" / name))


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_python_blocks_are_python(page: pathlib.Path) -> None:
    for block in fenced(page, "python"):
        compile(block, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_relative_links_resolve(page: pathlib.Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:|#", t)]
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_named_files_and_modules_exist(page: pathlib.Path) -> None:
    text = page.read_text(encoding="utf-8")
    written_out = {
        path for other in PAGES for path in re.findall(r'"""(configs/\w+\.py)', other.read_text(encoding="utf-8"))
    }
    folders = "dsjax|pallas_kernels|configs|scripts|tests|benchmarks|notebooks|docs"
    paths = re.findall(rf"(?<![\w/.-])(?:\./)?((?:{folders})/[\w/.-]*\w/?)", text)
    missing = [path for path in paths if path not in written_out and not (ROOT / path).exists()]
    missing += [name for name in re.findall(r"(?<![\w/.])dsjax(?:\.\w+)+", text) if not _exists(name)]
    assert not missing


def _exists(name: str) -> bool:
    """Whether a dotted name is a module, or leads to something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for attribute in parts[length:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def test_every_page_of_the_documents_is_in_the_reading_order() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES if (ROOT / "docs") in page.parents]
    assert not [page for page in pages if page != "index.md" and f"({page})" not in index]


def test_the_sharding_table_is_current() -> None:
    page = (ROOT / "docs" / "sharding.md").read_text(encoding="utf-8")
    assert page == sharding_table.replace_section(page), "run: python -m dsjax.sharding_table docs/sharding.md"


def test_no_figure_is_still_to_be_measured() -> None:
    left = [
        (page.name, what)
        for page in PAGES
        for what in re.findall(r"\{\{measure: [^}]*\}\}", page.read_text(encoding="utf-8"))
    ]
    assert not left
