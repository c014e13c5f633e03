"""The notebooks run from the first cell to the last, and are kept without outputs."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable

import nbclient
import nbformat
import pytest
from xla_flags import QUICK

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs(path: pathlib.Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None)


def forgiving_the_tools(test: Callable[..., None]) -> Callable[..., None]:
    """Warnings that are not ours: an event loop made where there is none, and a socket closed by the collector."""
    ours = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
    return pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")(ours(test))


def run(name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, again: str = "") -> tuple[list, str]:
    """The outputs of a notebook's code cells, and what it printed; the cell that begins with ``again`` runs twice."""
    monkeypatch.setenv("DSJAX_NOTEBOOK_STEPS", "12")
    monkeypatch.setenv("DSJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", QUICK)  # one device, as on a laptop
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    if again:
        (place,) = [i for i, cell in enumerate(notebook.cells) if cell.source.startswith(again)]
        notebook.cells.insert(place, nbformat.v4.new_code_cell(notebook.cells[place].source))
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    return outputs, printed


@forgiving_the_tools
def test_the_quickstart_runs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, printed = run("01_quickstart", tmp_path, monkeypatch, again="exit_code = pretrain.run")
    assert "resumed at step 12 of 12" in printed
    assert any("image/png" in output.get("data", {}) for output in outputs), "the loss is plotted inline"
    assert "| held-out bits per byte |" in printed
    assert "Kneser-Ney 5-gram" in printed
    assert printed.count("def read_line(self, file):") == 3


@pytest.mark.slow
@forgiving_the_tools
def test_the_plan_runs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, printed = run("02_plan", tmp_path, monkeypatch)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert "train on v5e:2x4: 8 chips, mesh fsdp=8" in printed
    assert "best of the 2 compiled" in printed
    results = "".join(output.get("data", {}).get("text/plain", "") for output in outputs)
    assert "bound by memory traffic: at most" in results


@forgiving_the_tools
def test_what_can_be_checked_is_learned(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, printed = run("03_r1", tmp_path, monkeypatch)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert printed.count(" before, ") == 3
    assert printed.count("right: ") == 6
    assert "countdown 4:  reach " in printed


@forgiving_the_tools
def test_the_checkpoint_goes_there_and_back(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, printed = run("04_checkpoints", tmp_path, monkeypatch)
    assert any("image/png" in output.get("data", {}) for output in outputs), "the likeliest tokens are plotted"
    values = [output.get("data", {}).get("text/plain", "") for output in outputs]
    equal = next(value for value in values if "'model.safetensors': " in value)
    assert "False" not in equal
    assert equal.count("True") >= 3
    first, last = map(float, re.findall(r"loss ([\d.]+) -> ([\d.]+)", printed)[0])
    assert last < first + 0.2  # twelve steps of a model that had twelve: it learns little, and loses nothing
    assert "largest difference of logits: 0.0\n" in printed
    assert "def main(" in printed


@forgiving_the_tools
def test_the_coder_is_told_and_kept_within_the_grammar(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, printed = run("02_coder", tmp_path, monkeypatch)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2, "the syntax and the losses"
    same, prefixes = re.findall(r"(\d+) of (\d+) prefixes have the same features, 17 numbers a token", printed)[0]
    assert same == prefixes
    plain, told = (
        int(re.findall(rf"{name}: ([\d,]+) parameters", printed)[0].replace(",", "")) for name in ("plain", "told")
    )
    assert abs(told - plain) < 0.002 * plain
    assert len(re.findall(r"(?:plain|told): \d\.\d{3} bits per byte", printed)) == 2
    for name in ("plain", "told"):
        ((good, of),) = re.findall(rf"{name}, within the grammar: (\d+) of (\d+) parse", printed)
        assert good == of != "0"
        assert f"---- {name}, within the grammar: parses" in printed
        assert re.search(rf"---- {name}, freely: (parses|refused, )", printed)
