"""The command line: help at once, options anywhere, one line and exit code 2 for every mistake."""

from __future__ import annotations

import inspect
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import typing

import pytest
from small_runs import ROOT, home, write_corpus

from dsjax import cli
from dsjax.cli import main
from dsjax.config import to_dict

TINY = str(ROOT / "configs" / "tiny.py")


def dsjax(*words: str) -> int:
    """The exit code of a command in this process."""
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    return int(stop.value.code or 0)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a refused command says."""
    capsys.readouterr()
    assert dsjax(*words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("dsjax: ")
    return lines[0].removeprefix("dsjax: ")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home()
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained() -> pathlib.Path:
    """A finished run of the small config."""
    run = home() / "trained"
    if not run.exists():
        assert dsjax("train", str(home() / "small.py"), "--run", str(run), "--quiet") == 0
    return run


# ---------------------------------------------------------------- help


def test_help_answers_within_a_second_and_a_half_and_without_jax() -> None:
    times = []
    for _ in range(3):  # the best of three: this machine may be busy
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "dsjax", "--help"], cwd=ROOT, capture_output=True, text=True
        )
        times.append(time.perf_counter() - begin)
        assert done.returncode == 0
    assert all(command in done.stdout for command in ("train", "eval", "generate", "inspect"))
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "dsjax.cli" in imported
    assert not imported & {"jax", "numpy", "flax", "matplotlib"}
    assert min(times) < 1.5


@pytest.mark.parametrize("command", ["train", "eval", "generate", "inspect"])
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dsjax(command, "--help") == 0
    said = capsys.readouterr().out
    assert f"usage: dsjax {command}" in said
    assert ("CONFIG" if command == "train" else "RUN") in said


def test_python_m_dsjax_is_dsjax() -> None:
    script = pathlib.Path(sys.executable).with_name("dsjax")
    commands = [[sys.executable, "-m", "dsjax"], *([[str(script)]] if script.exists() else [])]
    said = {subprocess.run([*c, "train", "--help"], cwd=ROOT, capture_output=True, text=True).stdout for c in commands}
    assert len(said) == 1
    assert "usage: dsjax train" in said.pop()


# ---------------------------------------------------------------- words in any order


@pytest.mark.parametrize(
    "words",
    [
        [TINY, "train.steps=3", "mesh.data=8", "--print-config"],
        ["--print-config", TINY, "train.steps=3", "mesh.data=8"],
        [TINY, "--print-config", "train.steps=3", "mesh.data=8"],
        [TINY, "train.steps=3", "--run", "r", "mesh.data=8", "--print-config"],
        ["--run=r", TINY, "train.steps=3", "--print-config", "mesh.data=8"],
    ],
)
def test_options_stand_anywhere_among_the_overrides(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert dsjax("train", *words) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["train"]["steps"] == 3
    assert shown["mesh"]["data"] == 8
    assert not pathlib.Path("r").exists()


@pytest.mark.parametrize("name", ["train", "plan", "data"])
def test_the_value_of_each_option_stays_behind_it(name: str) -> None:
    given = inspect.signature(getattr(cli, name)).parameters
    kinds = typing.get_type_hints(getattr(cli, name))
    for option in (key for key, parameter in given.items() if parameter.kind is parameter.KEYWORD_ONLY):
        value = [] if kinds[option] is bool else ["VALUE"]
        for word in (f"--{option}", f"--{option.replace('_', '-')}"):
            assert cli.gather_overrides([name, "a", word, *value, "b"]) == [name, "a", "b", word, *value]


def test_a_corpus_is_built_by_several_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsjax.data.command.run", lambda what, words, workers, quiet: 10 * workers + len(words))
    assert dsjax("data", "build", "SRC", "DST", "--workers", "8") == 82
    assert dsjax("data", "build", "--workers", "8", "SRC", "DST", "fim.rate=0.5") == 83


def test_print_config_shows_what_the_run_stores(trained: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dsjax("train", str(home() / "small.py"), "--print-config") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((trained / "config.json").read_text())


def test_the_folder_of_a_run_is_named_after_its_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert dsjax("train", str(home() / "small.py"), "train.steps=1", "--quiet") == 0
    assert sorted(p.name for p in pathlib.Path("runs/small").iterdir()) == [
        "checkpoints", "config.json", "data.json", "loss.png", "metrics.jsonl", "tokenizer.json",
    ]  # fmt: skip
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "expected one of {train, eval, generate, plan, kernels, inspect, convert, data}"),
        (["trains"], "trains"),
        (["train"], "CONFIG"),
        (["train", "nowhere.py"], "no config file nowhere.py"),
        (["train", TINY, "--bogus"], "--bogus"),
        (["train", TINY, "--run"], "--run"),
        (["train", TINY, "train.setps=3"], "unknown key train.setps; did you mean train.steps?"),
        (["train", TINY, "train.steps=many"], "train.steps is 'many'; it must be an integer"),
        (["train", TINY, "train.steps=1e3"], "train.steps is '1e3'"),
        (["train", TINY, "train.steps=1", "train.steps=2"], "train.steps is given twice"),
        (["train", TINY, "stray"], "override 'stray' is not of the form key=value"),
        (["train", TINY, "a\nb=\x1b[31m\u202e"], r"unknown key a b"),
        (["train", TINY, "data.end_token=\ud800"], "data.end_token and special_tokens are"),
        (["train", TINY, "optim.lr=1e400"], "optim.lr is '1e400'"),
        (["train", TINY, "mesh.tensor=3"], "mesh"),
        (["train", TINY, "data.batch_size=2000000000"], "this machine has"),
        (["train", TINY, "data.sources.0.path=nowhere"], "nowhere"),
        (["generate", "nowhere"], "there is no folder nowhere"),
        (["generate", "nowhere", "--max-tokens", "0"], "--max-tokens is 0"),
        (["generate", "nowhere", "--max-tokens", "few"], "--max-tokens"),
        (["generate", "nowhere", "--temperature", "nan"], "--temperature is nan"),
        (["generate", "nowhere", "--top-p", "2"], "--top-p is 2.0"),
        (["generate", "nowhere", "--seed", "-1"], "--seed is -1"),
        (["generate", "nowhere", "--prompt", "\udcff"], "the prompt is not UTF-8: byte 0 is 0xff"),
        (["eval", "nowhere", "--samples", "0"], "--samples is 0"),
        (["inspect", "nowhere"], "no run folder nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_makes_nothing(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refused(capsys, *words, *(["--quiet"] if words[:1] == ["train"] and "--run" not in words else []))
    assert not list(pathlib.Path().iterdir())


def test_a_mistake_in_a_process_of_its_own_exits_with_2_and_no_trace() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dsjax", "train", TINY, "mesh.tensor=7"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("dsjax: mesh ")
    assert len(done.stderr.splitlines()) == 1


OWN_CLASS = """from __future__ import annotations
import dataclasses

@dataclasses.dataclass(frozen=True)
class Mine:
    size: int = 3

get_config = Mine
"""


@pytest.mark.parametrize(
    ("content", "kind"), [("from dsjax.nn.mlp import MLPConfig as get_config\n", "MLPConfig"), (OWN_CLASS, "Mine")]
)
def test_a_config_that_is_no_recipe_is_refused(
    content: str, kind: str, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    (tmp_path / "c.py").write_text(content)
    said = refused(capsys, "train", "c.py")
    assert said == f"get_config() of c.py returned a {kind}, which is no recipe such as Pretrain"


# ---------------------------------------------------------------- run folders


def test_a_run_folder_that_is_a_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    pathlib.Path("r").write_text("x")
    assert "r can not be made: r is a file" in refused(capsys, "train", TINY, "--quiet", "--run", "r")
    assert "r/s can not be made" in refused(capsys, "train", TINY, "--quiet", "--run", "r/s")


def test_a_folder_that_holds_something_else_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    pathlib.Path("r").mkdir()
    pathlib.Path("r/thesis.tex").write_text("x")
    assert "not empty and holds no run" in refused(capsys, "train", TINY, "--quiet", "--run", "r")
    assert [p.name for p in pathlib.Path("r").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("place", ["/proc/dsjax", "x" * 300])
def test_a_place_that_can_not_be_written_is_refused(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"run folder {place} can not be" in refused(
        capsys, "train", str(home() / "small.py"), "--quiet", "--run", place
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    pathlib.Path("r").mkdir(mode=0o555)
    assert "r is not writable" in refused(capsys, "train", TINY, "--quiet", "--run", "r/s")


def test_a_run_of_another_config_is_refused_by_its_first_other_key(
    trained: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "config.json").read_bytes()
    words = ["train", str(home() / "small.py"), "--run", str(trained), "--quiet"]
    assert "was trained with model.d_model=8, now it is 16" in refused(capsys, *words, "model.d_model=16")
    assert "was trained with optim.lr=0.01, now it is 0.1" in refused(capsys, *words, "optim.lr=0.1")
    assert "train.steps is 4; the run in" in refused(capsys, *words, "train.steps=4")
    write_corpus(pathlib.Path("other"), seed=1)
    assert "the training data changed" in refused(capsys, *words, "data.sources.0.path=other")
    assert (trained / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json: it holds no config"),
        (json.dumps({"type": "os:Popen"}), "config.json: the class 'os:Popen' is none of dsjax"),
        (json.dumps({"type": "dsjax.nn.mlp:MLPConfig"}), "config.json holds a MLPConfig, which describes no run"),
    ],
)
def test_a_corrupted_config_of_a_run_is_refused(content: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    pathlib.Path("r/checkpoints/3").mkdir(parents=True)
    pathlib.Path("r/config.json").write_text(content)
    for command in (["train", TINY, "--quiet", "--run", "r"], ["generate", "r"], ["inspect", "r"], ["eval", "r"]):
        assert named in refused(capsys, *command)


def test_a_run_without_a_checkpoint_is_refused(trained: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    pathlib.Path("r").mkdir()
    pathlib.Path("r/config.json").write_bytes((trained / "config.json").read_bytes())
    for command in (["generate", "r"], ["inspect", "r"], ["eval", "r"]):
        assert "no checkpoint" in refused(capsys, *command)


def test_a_run_stopped_before_its_first_checkpoint_may_begin_anew_otherwise(trained: pathlib.Path) -> None:
    pathlib.Path("r").mkdir()
    pathlib.Path("r/config.json").write_bytes((trained / "config.json").read_bytes())
    assert dsjax("train", str(home() / "small.py"), "optim.lr=0.1", "train.steps=1", "--quiet", "--run", "r") == 0
    assert json.loads(pathlib.Path("r/config.json").read_text())["optim"]["lr"] == 0.1


# ---------------------------------------------------------------- inspect, generate


def test_inspect_shows_what_a_resume_would_take(
    trained: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dsjax("inspect", str(trained), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["step", "num_params", "state_hash", "hashes"]
    # embedding and output 2 * 300 * 8, attention 4 * 8 * 8, mlp 3 * 8 * 16, norms 3 * 8
    assert (found["step"], found["num_params"]) == (8, 4800 + 256 + 384 + 24)
    assert list(found["hashes"]) == ["data", "loop", "optimizer", "parameters", "rng", "step"]
    assert all(len(h) == 64 for h in [found["state_hash"], *found["hashes"].values()])
    shutil.copytree(trained, other := tmp_path / "[red] run")  # a name is no markup
    assert dsjax("inspect", str(other)) == 0
    shown = capsys.readouterr().out
    assert found["state_hash"] in shown
    assert "[red] run" in shown


def test_generate_continues_an_empty_prompt_and_one_from_standard_input(
    trained: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dsjax("generate", str(trained), "--max-tokens", "3", "--seed", "4294967295") == 0
    assert capsys.readouterr().out.endswith("\n")
    done = subprocess.run(
        [sys.executable, "-m", "dsjax", "generate", str(trained), "--prompt", "-", "--max-tokens", "2"],
        cwd=ROOT, capture_output=True, input=b"abcd ",
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.startswith(b"abcd ")


def test_standard_input_that_is_not_utf_8_is_refused(trained: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dsjax", "generate", str(trained), "--prompt", "-"],
        cwd=ROOT, capture_output=True, input=b"a\xff",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, b"dsjax: the prompt is not UTF-8: byte 1 is 0xff\n")


def test_a_prompt_longer_than_the_model_is_refused(trained: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the model holds 16" in refused(capsys, "generate", str(trained), "--prompt", "abcd " * 40)


def test_a_reader_that_goes_away_is_no_error(trained: pathlib.Path) -> None:
    shell = f"{sys.executable} -m dsjax inspect {trained} --json | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("{0\n", "")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("--help >/dev/full", 2, "dsjax: output can not be written: No space left on device\n"),
        ("--help >&-", 0, ""),
        ("nothing 2>&-", 2, ""),
    ],
)
def test_output_that_can_not_be_written_is_no_trace(words: str, code: int, said: str) -> None:
    shell = f"{sys.executable} -m dsjax {words}"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", said)


def test_the_stored_config_is_the_resolved_one(trained: pathlib.Path) -> None:
    import small_runs

    assert json.loads((trained / "config.json").read_text()) == json.loads(json.dumps(to_dict(small_runs.small())))
