"""A run of a fraction of a second: its corpus, its config, and ways to start it."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from xla_flags import QUICK

from dsjax.checkpoint import Checkpoints, combined_hash, state_hashes
from dsjax.data.corpus import Source
from dsjax.data.prepare import DataConfig
from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import CheckpointConfig, Pretrain, TrainConfig

ROOT = pathlib.Path(__file__).parent.parent
ATTENTION = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=4)


@functools.cache
def home() -> pathlib.Path:
    """A folder for this test process, with caches of its own."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="dsjax-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["DSJAX_CACHE"] = str(folder / "cache")
    write_corpus(folder / "corpus")
    (folder / "small.py").write_text(
        '"""The config of the tests."""\n\nimport small_runs\n\n\ndef get_config():\n'
        f"    return small_runs.small({str(folder / 'corpus')!r})\n"
    )
    return folder


def write_corpus(folder: pathlib.Path, *, seed: int = 0) -> None:
    """Thirty texts of made-up words."""
    words = random.Random(seed)
    folder.mkdir()
    for number in range(30):
        text = " ".join("".join(words.choices("abcdefgh", k=4)) for _ in range(60))
        (folder / f"{number}.txt").write_text(text)


def small(corpus: str | None = None) -> Pretrain:
    return Pretrain(
        model=DecoderConfig(
            vocab_size=300, d_model=8, num_layers=1, groups=(LayerGroup(MLPConfig(d_ff=16), ATTENTION),)
        ),
        data=DataConfig(
            sources=(Source(corpus or str(home() / "corpus")),),
            vocab_size=300,
            seq_len=16,
            batch_size=8,
            held_out_share=0.2,
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        train=TrainConfig(steps=8, log_every=4),
        checkpoint=CheckpointConfig(every=4, keep=8),
    )


def small_moe(corpus: str | None = None, *, bias_update_rate: float = 0.0) -> Pretrain:
    experts = MoEConfig(num_experts=4, top_k=2, d_ff=8, num_shared_experts=1, bias_update_rate=bias_update_rate)
    moe = LayerGroup(experts, ATTENTION)
    model = DecoderConfig(
        vocab_size=300, d_model=8, num_layers=2, groups=(LayerGroup(MLPConfig(d_ff=16), ATTENTION, 1), moe)
    )
    return dataclasses.replace(small(corpus), model=model)


def large(corpus: str | None = None) -> Pretrain:
    """A state of 200 MB: 16.7M parameters, nearly all of them in the embedding and the output matrix."""
    model = dataclasses.replace(small(corpus).model, vocab_size=65_200, d_model=128, tied=False)
    return dataclasses.replace(small(corpus), model=model)


def changed(config: Pretrain, **parts: dict[str, Any]) -> Pretrain:
    """``config`` with fields of its parts replaced: ``changed(c, train={"steps": 3})``."""
    return dataclasses.replace(config, **{k: dataclasses.replace(getattr(config, k), **v) for k, v in parts.items()})


# ---------------------------------------------------------------- what a run left


def saved(run: pathlib.Path, step: int | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any], int]:
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    try:
        return checkpoints.load_numpy(step)
    finally:
        checkpoints.close()


def saved_steps(run: pathlib.Path) -> list[int]:
    return sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())


def state_hash(run: pathlib.Path, step: int | None = None) -> str:
    arrays, host, _ = saved(run, step)
    return combined_hash(state_hashes(arrays, host))


def state_hash_or_none(run: pathlib.Path) -> str | None:
    """None: nothing is saved yet."""
    return state_hash(run) if (run / "checkpoints").is_dir() and saved_steps(run) else None


def training_records(run: pathlib.Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if "loss" in r]


# ---------------------------------------------------------------- processes


class Child:
    """``dsjax`` in a process of its own, on one pinned core: XLA:CPU's sums depend on the number of threads."""

    def __init__(
        self,
        *arguments: str,
        code: str = "",
        env: dict[str, str] | None = None,
        cwd: Any = None,
        core: int | None = None,
    ):
        core = min(os.sched_getaffinity(0)) if core is None else core
        pin = f"import os\nos.sched_setaffinity(0, {{{core}}})\n"
        program = [sys.executable, "-c", f"{pin}{code}\nfrom dsjax.cli import main\nmain()"]
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        ours = {"XLA_FLAGS": QUICK, "PYTHONPATH": path, "DSJAX_CACHE": str(home() / "cache")}
        self.process = subprocess.Popen(
            [*program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env=os.environ | ours | (env or {}),
        )
        self.said = ""

    def wait_for(self, text: str) -> Child:
        """Until it has said ``text`` on standard error."""
        assert self.process.stderr is not None
        while text not in self.said:
            line = self.process.stderr.readline()
            assert line, f"ended without saying {text!r}:\n{self.said}"
            self.said += line
        return self

    def send(self, number: signal.Signals) -> Child:
        self.process.send_signal(number)
        return self

    def end(self, timeout: float = 60) -> tuple[int, str, str]:
        """Exit code, standard output, all of standard error."""
        out, err = self.process.communicate(timeout=timeout)
        self.said += err
        return self.process.returncode, out, self.said

    def seconds_to_end(self) -> float:
        begin = time.perf_counter()
        self.end()
        return time.perf_counter() - begin
