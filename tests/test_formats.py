"""Loading files: tensors as they were saved, typed errors for damage, no path out of a folder, no pickle."""

from __future__ import annotations

import ast
import json
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import tokenizers
from chaos import formats
from chaos.children import failures

from dsjax.config import UserError
from dsjax.data.tokenizer import MOST_BYTES, load_tokenizer, train_tokenizer
from dsjax.manifest import stays_inside
from dsjax.tensor_files import DTYPES, INDEX, SINGLE, TensorFiles

ROOT = pathlib.Path(__file__).parent.parent


# ---------------------------------------------------------------- tensors


def _save(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a .safetensors file by the format's definition, for types that the library has no arrays for."""
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header, offset = {}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": names[x.dtype], "shape": x.shape, "data_offsets": [offset, offset + x.nbytes]}
        offset += x.nbytes
    text = json.dumps(header).encode()
    content = b"".join(x.tobytes() for x in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def _some(dtype: Any, *shape: int) -> np.ndarray:
    return (np.random.default_rng(0).random(shape) * 3).astype(dtype)


ALL = {f"w.{name}": _some(dtype, 3, 5) for name, dtype in DTYPES.items()}


def test_every_type_is_read_as_it_was_saved(tmp_path: pathlib.Path) -> None:
    _save(tmp_path / SINGLE, ALL | {"scalar": _some("float32"), "empty": _some("float16", 0, 4)})
    for tensors in (TensorFiles(tmp_path), TensorFiles(tmp_path / SINGLE)):
        assert set(tensors) == {*ALL, "scalar", "empty"}
        for name, x in ALL.items():
            assert tensors[name].dtype == tensors.kind(name).dtype == x.dtype
            assert tensors[name].tobytes() == x.tobytes()
        assert tensors["scalar"].shape == ()
        assert tensors["empty"].shape == tensors.kind("empty").shape == (0, 4)
    with pytest.raises(KeyError):
        tensors["other"]


def test_what_the_library_writes_is_read(tmp_path: pathlib.Path) -> None:
    from safetensors.numpy import save_file

    saved = {"b": _some(ml_dtypes.bfloat16, 7, 3), "a": _some("int64", 11), "c": _some("float32", 2, 2, 2)}
    save_file(saved, tmp_path / "x.safetensors", metadata={"format": "pt"})
    for name, x in TensorFiles(tmp_path / "x.safetensors").items():
        np.testing.assert_array_equal(x, saved[name])


def test_nothing_is_read_before_it_is_asked_for(tmp_path: pathlib.Path) -> None:
    _save(tmp_path / SINGLE, {"a": _some("float32", 100), "b": _some("float32", 100)})
    tensors = TensorFiles(tmp_path)
    content = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(content[:-100])
    assert tensors["a"].shape == (100,)
    with pytest.raises(UserError, match=r"model\.safetensors: tensor 'b' is cut short, 300 of 400 bytes are there"):
        tensors["b"]


def _indexed(folder: pathlib.Path, **where: str) -> TensorFiles:
    _save(folder / "one.safetensors", {"a": _some("float32", 4)})
    _save(folder / "two.safetensors", {"b": _some("float32", 5)})
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"} | where}))
    return TensorFiles(folder)


def test_an_index_joins_files(tmp_path: pathlib.Path) -> None:
    assert {name: x.shape for name, x in _indexed(tmp_path).items()} == {"a": (4,), "b": (5,)}


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("../out.safetensors", "names '../out.safetensors', which is no file of its folder"),
        ("inside/../../out.safetensors", "which is no file of its folder"),
        ("{outside}", "which is no file of its folder"),
        ("link.safetensors", "names 'link.safetensors', which is no file of its folder"),
        ("folder/out.safetensors", "which is no file of its folder"),
        ("", "which is no file of its folder"),
        ("x\n", "which is no file of its folder"),
        ("three.safetensors", "no file .*three.safetensors"),
        ("two.safetensors", "two.safetensors: tensor 'a' is missing, model.safetensors.index.json says it is here"),
    ],
)
def test_an_index_names_files_of_its_folder_only(tmp_path: pathlib.Path, file: str, said: str) -> None:
    folder, outside = tmp_path / "model", tmp_path / "out.safetensors"
    folder.mkdir()
    _save(outside, {"a": _some("float32", 4)})
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "folder").symlink_to(tmp_path)
    assert TensorFiles(outside)["a"].shape == (4,)  # the control: but for where it is, the file is good
    with pytest.raises(UserError, match=said):
        _indexed(folder, a=file.format(outside=outside))


def test_a_downloads_snapshot_links_to_its_blobs_and_to_nothing_else(tmp_path: pathlib.Path) -> None:
    """The cache of huggingface_hub: every file of a snapshot is a link to a blob of its repository."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    _indexed(snapshot)
    for file in list(snapshot.iterdir()):
        file.rename(blobs / f"hash-of-{file.name}")
        file.symlink_to(f"../../blobs/hash-of-{file.name}")
    assert {name: x.shape for name, x in TensorFiles(snapshot).items()} == {"a": (4,), "b": (5,)}
    (blobs / "hash-of-one.safetensors").rename(tmp_path / "elsewhere")
    (snapshot / "one.safetensors").unlink()
    (snapshot / "one.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"names 'one\.safetensors', which is no file of its folder"):
        TensorFiles(snapshot)


def test_a_name_stays_inside_its_folder_or_is_refused() -> None:
    for name in ("a", "a/b.json", "d/0", "..a", "a..b", "é"):
        assert stays_inside(name)
    for name in ("", "/a", "a/", "a//b", ".", "..", "../a", "a/../../b", "a/..", "C:a", "a\\b", "a\0", "a\n", "\ud800"):
        assert not stays_inside(name)


def test_a_type_that_is_unknown_is_named(tmp_path: pathlib.Path) -> None:
    header = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(UserError, match=r"a\.safetensors: tensor 'x' has type F4; it must be one of F64, F32"):
        TensorFiles(tmp_path / "a.safetensors")


def test_pickled_weights_are_no_tensors(tmp_path: pathlib.Path) -> None:
    (tmp_path / SINGLE).write_bytes(b"\x80\x04\x95\x1a\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.")
    with pytest.raises(UserError, match="not a safetensors file"):
        TensorFiles(tmp_path)
    with pytest.raises(UserError, match=r"no file .*nowhere"):
        TensorFiles(tmp_path / "nowhere")


# ---------------------------------------------------------------- tokenizers


PANICS = {
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},  # when it is loaded
    "decoder": {"type": "Strip", "content": "s", "start": 2**40, "stop": 2**60},  # when it decodes
}


def _use(path: pathlib.Path) -> None:
    inner = tokenizers.Tokenizer.from_file(str(path))
    inner.decode(inner.encode("s").ids)


def test_a_panic_of_the_library_is_one_sentence(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tokenizer.json"
    good = train_tokenizer(["some text\n"], 280).to_json()
    for part, value in PANICS.items():
        path.write_text(json.dumps(json.loads(good) | {part: value}), encoding="utf-8")
        with pytest.raises(BaseException, match=r"index|Precompiled") as raw:
            _use(path)
        assert not isinstance(raw.value, Exception)  # the control: it is a panic
        with pytest.raises(UserError, match=r"tokenizer\.json: .* \(") as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value)


def test_ids_stay_below_the_size_of_the_vocabulary(tmp_path: pathlib.Path) -> None:
    tree = json.loads(train_tokenizer(["some text\n"], 280).to_json())
    tree["model"]["vocab"]["s"] = 999
    (tmp_path / "t.json").write_text(json.dumps(tree), encoding="utf-8")
    assert load_tokenizer(tmp_path / "t.json").vocab_size == 1000


def test_a_tokenizer_of_gigabytes_is_not_read(tmp_path: pathlib.Path) -> None:
    with (tmp_path / "t.json").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(UserError, match=f"it has {MOST_BYTES + 1} bytes, more than {MOST_BYTES}"):
        load_tokenizer(tmp_path / "t.json")


# ---------------------------------------------------------------- chaos


def test_every_mutant_is_valid_or_a_typed_error() -> None:
    assert not list(failures(formats.__name__, 450, 0))


def test_with_the_checks_off_mutants_escape_and_raise() -> None:
    found = "\n".join(failures(formats.__name__, 200, 0, defended=False))
    for name in ("tokenizer: raised", "safetensors index: raised", "manifest with a right seal: raised"):
        assert name in found


# ---------------------------------------------------------------- no pickle

RUNS_CODE = {
    "import pickle": "TID251",
    "import dill": "TID251",
    "import shelve": "TID251",
    "from joblib import load": "TID251",
    "import pandas\nx = pandas.read_pickle('x')": "S301",
    "import marshal\nx = marshal.loads(b'')": "S302",
    "import torch\nx = torch.load('x')": "TID251",
    "import yaml\nx = yaml.load('x', Loader=yaml.UnsafeLoader)": "S506",
}
FOLDERS = ("dsjax", "pallas_kernels", "configs", "benchmarks", "scripts", "tests")


def _lint(*arguments: str, text: str = "") -> str:
    ruff = shutil.which("ruff", path=str(pathlib.Path(sys.executable).parent)) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("ruff is not installed")
    command = [ruff, "check", "--no-cache", "--output-format", "concise", *arguments]
    return subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_linter_refuses_what_runs_code_while_it_loads(folder: str) -> None:
    at = ("--stdin-filename", f"{folder}/some.py", "-")
    for text, rule in RUNS_CODE.items():
        assert re.search(rf"\b{rule}\b", _lint(*at, text=f"{text}\n")), text
    assert "S301" not in _lint(*at, text="import json\n\nx = json.loads('1')\n")  # the control


def test_nothing_of_ours_runs_code_while_it_loads() -> None:
    assert "All checks passed" in _lint("--select", "S301,S302,S506,TID251", *FOLDERS)


def test_numpy_never_unpickles() -> None:
    found = []
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
                safe = isinstance(node.value, ast.Constant) and node.value.value is (node.arg == "weights_only")
                found += [] if safe else [f"{path.name}:{node.value.lineno}"]
    assert not found


def test_the_library_still_checks_what_is_left_to_it(tmp_path: pathlib.Path) -> None:
    """Offsets are taken from the order of the tensors: this is only right while a file may have no gap."""
    header = json.dumps({"x": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(tmp_path / "a.safetensors", "numpy"):
        pass
    with pytest.raises(UserError, match="not a safetensors file"):
        TensorFiles(tmp_path / "a.safetensors")
