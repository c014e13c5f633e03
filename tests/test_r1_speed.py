"""The loops whose speed is compared make the same update; and what is said of their speed is counts over seconds."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import r1_runs
from safetensors.numpy import load_file, save_file
from xla_flags import QUICK

from benchmarks import r1_speed
from benchmarks.r1_speed import asked, check, differences, exercises_of, prepare, summary, times
from benchmarks.turns import Worker
from dsjax.models.decoder import LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.tensor_files import TensorFiles
from dsjax.train.r1 import R1, byte_tokenizer

ROOT = pathlib.Path(__file__).parent.parent
SAMPLES = 4


def config() -> R1:
    """Two layers, grouped queries; eight exercises."""
    group = LayerGroup(MLPConfig(d_ff=24), AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4))
    return r1_runs.r1(
        model={"vocab_size": 257, "d_model": 16, "num_layers": 2, "groups": (group,)},
        exercises={"answer_mark": "= "},
        rewards={"length": 0.0},
        rollout={"samples": SAMPLES, "max_tokens": 12, "more_rounds": 0},
        optim={"lr": 1e-2, "warmup_steps": 0, "clip_norm": 0.1},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """With the model that all begin with; every process here has one device."""
    folder = tmp_path_factory.mktemp("r1_speed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", QUICK)
        patch.setenv("DSJAX_CACHE", str(folder / "cache"))
        prepare(config(), folder)
        yield folder


@contextlib.contextmanager
def working(name: str, folder: pathlib.Path, python: str, module: str) -> Iterator[Worker]:
    worker = Worker(f"{name}@{folder}", python, module)
    try:
        yield worker
    finally:
        worker.close()
        worker.process.stdout.close()


@pytest.fixture(scope="module")
def ours(folder: pathlib.Path) -> Iterator[Worker]:
    with working("dsjax", folder, sys.executable, r1_speed.MODULE) as worker:
        yield worker


def texts_for(case: dict[str, Any]) -> dict[str, Any]:
    """Of each exercise the right answer, cut off and ended, and others; but of the first all are wrong."""
    tokens, ended, encode = list[list[int]](), list[bool](), byte_tokenizer().encode
    for place, answer in enumerate(case["answers"]):
        right = f"= {answer}" if place else "= ?"
        for text, end in ((right, True), (right, False), ("no", True), (f"x\n{right}", True))[:SAMPLES]:
            tokens.append(encode(text).tolist())
            ended.append(end)
    chance = np.random.default_rng(1)
    lengths = [len(t) + e for t, e in zip(tokens, ended, strict=True)]
    return {
        "tokens": tokens,
        "ended": ended,
        "log_probs": [(-5.5 + chance.normal(0, 0.3, length)).tolist() for length in lengths],
    }


# ---------------------------------------------------------------- the same update


@pytest.mark.slow
def test_dsjax_learns_what_teaches(folder: pathlib.Path, ours: Worker) -> None:
    case = asked(config(), 0)
    texts = texts_for(case)
    told = ours.ask(json.dumps({**case, "learn": texts, "to": str(folder / "ours.safetensors")}))
    assert told["rewards"] == [0.0] * SAMPLES + [1.0, 0.0, 0.0, 1.0] * 7
    lengths = [len(t) + e for t, e in zip(texts["tokens"], texts["ended"], strict=True)]
    assert told["learned"] == sum(lengths[SAMPLES:])  # all but the group in which all are wrong
    before, after = dict(TensorFiles(folder / "hf")), load_file(folder / "ours.safetensors")
    assert set(after) == set(before)
    # Adam's first step is the learning rate, up or down, wherever there is a gradient.
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_allclose(np.median(np.abs(after[name] - before[name])), 1e-2, rtol=1e-3)


@pytest.mark.slow
def test_an_iteration_is_counted_whole(ours: Worker) -> None:
    told = ours.ask(json.dumps(asked(config(), 1)))
    assert told["texts"] == 8 * SAMPLES
    assert 8 * SAMPLES <= told["written"] <= 8 * SAMPLES * 12
    assert told["compiled"] > 0  # the engine's programs
    assert told["seconds"].keys() == set(r1_speed.PHASES)
    assert min(told["seconds"].values()) > 0


def torch_python() -> str:
    """An interpreter with PyTorch and transformers: that of ``scripts/bench r1 --torch``, or the one that is named."""
    python = os.environ.get("DSJAX_TORCH_PYTHON", str(ROOT / ".venv-torch" / "bin" / "python"))
    there = pathlib.Path(python).is_file()
    found = there and subprocess.run([python, "-c", "import torch, transformers"], capture_output=True, check=False)
    return python if found and found.returncode == 0 else ""


@pytest.mark.slow
def test_a_loop_of_pytorch_makes_the_same_update(folder: pathlib.Path) -> None:
    if not (python := torch_python()):
        pytest.skip("there is no interpreter with PyTorch and transformers")
    case = asked(config(), 0)
    modules = {"dsjax": (sys.executable, r1_speed.MODULE), "hf": (python, "benchmarks.torch_grpo")}
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(working(name, folder, *of)) for name, of in modules.items()}
        found = check(workers, folder, case, texts_for(case))["hf"]
        row = workers["hf"].ask(json.dumps(asked(config(), 1)))
    assert found["rewards"] == 0
    assert found["loss"] < 1e-5  # of a loss of 0.1; float32 in another order
    assert found["gradient norm"] < 1e-4
    assert found["step"] < 1e-2  # see `differences`
    assert row["texts"] == 8 * SAMPLES


def test_another_update_is_told(tmp_path: pathlib.Path) -> None:
    before = {"w": np.zeros(4, np.float32)}
    save_file({"w": np.full(4, 1e-3, np.float32)}, tmp_path / "dsjax.safetensors")
    save_file({"w": np.full(4, 1.001e-3, np.float32)}, tmp_path / "hf.safetensors")
    told = {"loss": 0.5, "rewards": [1.0, 0.0], "grad_norm": 2.0}
    found = differences(tmp_path, before, told, told, "hf")
    assert found["step"] == pytest.approx(1e-3, rel=1e-3)
    for changed in ({"loss": 0.501}, {"rewards": [1.0, 1.0]}, {"grad_norm": 2.01}):
        with pytest.raises(RuntimeError, match="another update"):
            differences(tmp_path, before, told, told | changed, "hf")
    save_file({"w": np.array([1e-3, 1e-3, 1e-3, -1e-3], np.float32)}, tmp_path / "hf.safetensors")
    with pytest.raises(RuntimeError, match="step differs"):
        differences(tmp_path, before, told, told, "hf")


# ---------------------------------------------------------------- figures


def rows(rollout: float, update: float) -> list[dict[str, Any]]:
    counts = {"texts": 256, "written": 2000, "learned": 1000.0, "longest": 48, "reward": 0.5, "compilation": 0.0}
    return [counts | {"seconds": {"rollout": rollout * n, "reward": 0.5, "update": update * n}} for n in (1, 2, 3)]


def test_rates_are_counts_over_seconds() -> None:
    found = summary(rows(4.0, 1.0))
    assert found["rates"]["rollout texts/s"] == 32  # of the second: 256 / 8
    assert found["rates"]["update tokens/s"] == 500
    assert found["rates"]["iterations/s"] == pytest.approx(1 / 10.5)
    assert found["shares"]["reward"] == pytest.approx(0.5 / 10.5)
    faster = times(rows(4.0, 1.0), rows(10.0, 1.0), "rollout tokens/s")
    assert faster["median"] == pytest.approx(2.5)
    assert (faster["least"], faster["most"]) == pytest.approx((2.5, 2.5))
    assert times(rows(4.0, 1.0), rows(10.0, 1.0), "update tokens/s")["median"] == 1


def test_each_family_and_level_is_asked_alike() -> None:
    config = r1_speed.config_of("0.7M")
    first, second = exercises_of(config, 0), exercises_of(config, 1)
    assert len(first) == config.rollout.prompts
    assert 10e6 < r1_speed.config_of("10M").model.num_params() < 12e6
    assert {(family, level) for family, level, _ in first} == {(f, n) for f in ("reverse", "sort") for n in range(1, 7)}
    assert not set(first) & set(second)
    assert asked(config, 0)["prompts"][0][0] == byte_tokenizer().end_id
