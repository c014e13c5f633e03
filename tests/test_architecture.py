"""The shape of the house: which way imports point, how long things may get, what may not be there at all."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
from collections.abc import Iterator

import jax
import pytest
from flax import nnx

from dsjax.config import load_config, validate
from dsjax.train.pretrain import make_model

ROOT = pathlib.Path(__file__).parent.parent

# Lowest first. A module may import those of its own entry and of entries before it. The longest entry that a
# module's name begins with is the one that counts.
LAYERS = (
    ("pallas_kernels",),
    ("dsjax.config",),
    ("dsjax.hosts", "dsjax.background", "dsjax.manifest"),
    ("dsjax.sharding", "dsjax.metrics", "dsjax.checkpoint", "dsjax.tensor_files"),
    ("dsjax.nn",),
    ("dsjax.models",),
    ("dsjax.sharding_table", "dsjax.data"),
    ("dsjax.runs",),
    ("dsjax.runtime", "dsjax.inspection", "dsjax.infer", "dsjax.convert", "dsjax.loaded"),
    ("dsjax.rl",),
    ("dsjax.evals",),
    ("dsjax.train",),
    ("dsjax.plan",),
    ("dsjax.cli",),
    ("dsjax.__main__",),
)
# A file that serves every language model or every recipe stays readable in one sitting.
FILE_LINES, FUNCTION_LINES, SCRIPT_LINES = 500, 80, 40


def sources(*folders: str) -> list[pathlib.Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def rank(module: str) -> int:
    entries = [
        (len(entry), i) for i, layer in enumerate(LAYERS) for entry in layer if f"{module}.".startswith(f"{entry}.")
    ]
    assert entries, f"{module} has no place in LAYERS"
    return max(entries)[1]


def imports(path: pathlib.Path) -> Iterator[str]:
    """Modules of ours and of others that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            yield node.module or ""


def repository_files() -> list[pathlib.Path]:
    """What git tracks, or would if everything were added."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_dependencies_point_one_way() -> None:
    upward = []
    for path in sources("dsjax", "pallas_kernels"):
        for name in imports(path):
            if name.split(".")[0] in ("dsjax", "pallas_kernels") and name != "dsjax":
                module = module_name(path)
                if module != "dsjax" and rank(name) > rank(module):
                    upward.append(f"{module} imports {name}")
    assert not upward


def test_the_order_has_no_room_for_an_import_of_dsjax_by_a_kernel() -> None:
    for path in sources("pallas_kernels"):
        assert not [name for name in imports(path) if name.split(".")[0] == "dsjax"], path.name


def test_files_and_functions_stay_short() -> None:
    long = []
    for path in sources("dsjax", "pallas_kernels", "configs", "tests", "benchmarks"):
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) >= FILE_LINES:
            long.append(f"{path.relative_to(ROOT)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length >= FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {length} lines")
    assert not long


@pytest.mark.parametrize("path", sorted(p for p in (ROOT / "scripts").iterdir() if p.is_file()), ids=lambda p: p.name)
def test_a_script_holds_no_logic(path: pathlib.Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= SCRIPT_LINES


def test_nothing_is_pickled() -> None:
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("dsjax", "pallas_kernels", "configs", "benchmarks")
        for name in imports(path)
        if name.split(".")[0] in banned
    ]
    assert not found


def test_every_file_is_named_after_what_it_holds() -> None:
    vague = re.compile(r"(^|_)(utils?|helpers?|misc|common|stuff|manager|info|data2)(_|$)")
    assert not [str(p.relative_to(ROOT)) for p in repository_files() if vague.search(p.stem.lower())]


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    home = re.compile(r"(?<![\w.>})*~-])/(tmp|work|home|root|Users|mnt|opt)/\w")
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        for number, line in enumerate(text.splitlines(), 1):
            if home.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found


def test_every_public_function_and_class_says_what_it_does() -> None:
    silent = []
    for path in sources("dsjax", "pallas_kernels"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree):
            silent.append(module_name(path))
        for node in tree.body:
            named = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            if named and not node.name.startswith("_") and not ast.get_docstring(node):
                silent.append(f"{module_name(path)}.{node.name}")
    assert not silent


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.py")), ids=lambda p: p.stem)
def test_every_config_loads_and_says_what_came_of_it(path: pathlib.Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert f"dsjax train {path.relative_to(ROOT)}" in docstring, "the docstring gives the command"
    assert "Result" in docstring or "not yet run" in docstring.lower(), "the docstring gives the result"
    config = load_config(path)
    validate(config)
    model = nnx.eval_shape(lambda: make_model(config, nnx.Rngs(0)))
    arrays = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert config.model.num_params() == sum(leaf.size for leaf in jax.tree.leaves(arrays))


def test_slow_tests_are_there() -> None:
    lines = (ROOT / "tests" / "slow.txt").read_text().splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    assert len(set(names)) == len(names)
    for name in names:
        file, _, case = name.partition("::")
        assert f"def {case.partition('[')[0]}(" in (ROOT / "tests" / file).read_text(), name
