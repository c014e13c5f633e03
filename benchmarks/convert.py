"""Converts a random checkpoint of a Hugging Face layout and back: megabytes a second, and memory in shards.

Each conversion is a process of its own. Its memory is the largest resident set less what it has behind the imports.
Beside it, in the same run: a plain copy of the same files, brought to the disk.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.timing import ROOT

BYTES, SHARDS = 2 * 10**9, 10
# Llama-shaped (as DeepSeek-Coder 1.3B) and as DeepSeek-V2-Lite, with as many layers and experts as make 2 GB.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 16384,
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "v2_lite": {
        "model_type": "deepseek_v2",
        "vocab_size": 16384,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 44,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "topk_method": "greedy",
    },
}


def write_checkpoint(folder: pathlib.Path, config: dict[str, Any]) -> None:
    """A checkpoint of random bfloat16 numbers in :data:`SHARDS` files of about one size."""
    from safetensors.numpy import save_file

    from dsjax.convert.families import config_from_hf
    from dsjax.convert.names import places, variables_of

    model = config_from_hf(config)
    shapes = {name: place.shape for name, place in places(model, config, variables_of(model)).items()}
    share = 2 * sum(map(math.prod, shapes.values())) / SHARDS
    rng, written, where = np.random.default_rng(0), 0.0, dict[str, str]()
    shards: list[list[str]] = [[] for _ in range(SHARDS)]
    for name, shape in shapes.items():
        shards[min(int(written / share), SHARDS - 1)].append(name)
        written += 2 * math.prod(shape)
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        tensors = {n: rng.standard_normal(shapes[n], np.float32).astype(ml_dtypes.bfloat16) for n in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")


def child(source: str, target: str) -> None:
    """One conversion; prints its seconds and, in bytes, the memory that it took beyond its imports."""
    from dsjax.convert.command import Request, run
    from dsjax.runtime import configure

    configure()
    import orbax.checkpoint  # noqa: F401
    import tensorstore  # noqa: F401

    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins here
    before, begin, cpu = _memory("VmRSS"), time.perf_counter(), time.process_time()
    run(Request(pathlib.Path(source), pathlib.Path(target), quiet=True))
    took = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
    print(json.dumps(took | {"bytes": _memory("VmHWM") - before}))


def _memory(field: str) -> int:
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


def copied(source: pathlib.Path, target: pathlib.Path) -> float:
    """Seconds of a plain copy of all files, each brought to the disk."""
    begin = time.perf_counter()
    target.mkdir()
    for path in sorted(source.iterdir()):
        with path.open("rb") as read, (target / path.name).open("wb") as written:
            while block := read.read(2**24):
                written.write(block)
            written.flush()
            os.fsync(written.fileno())
    return time.perf_counter() - begin


def converted(source: pathlib.Path, target: pathlib.Path) -> dict[str, float]:
    """What :func:`child` found."""
    command = [sys.executable, "-m", "benchmarks.convert", str(source), str(target)]
    said = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(said.splitlines()[-1])


def measure(rounds: int, folder: pathlib.Path | None = None) -> dict[str, Any]:
    """Medians over rounds, in each of which copy, import and export take turns; files are compared at the end."""
    figures: dict[str, Any] = {"rounds": rounds}
    for kind, config in CONFIGS.items():
        with tempfile.TemporaryDirectory(dir=folder) as name:
            source, run, back, copy = (pathlib.Path(name) / part for part in ("source", "run", "back", "copy"))
            source.mkdir()
            write_checkpoint(source, config)
            sizes = [path.stat().st_size for path in source.glob("*.safetensors")]
            found: dict[str, list[float]] = {}
            for _ in range(rounds):
                for path in (run, back, copy):
                    subprocess.run(["rm", "-rf", str(path)], check=True)
                found.setdefault("copy_mb_s", []).append(sum(sizes) / 1e6 / copied(source, copy))
                for way, (start, end) in {"to_run": (source, run), "to_hf": (run, back)}.items():
                    took = converted(start, end)
                    found.setdefault(f"{way}_mb_s", []).append(sum(sizes) / 1e6 / took["seconds"])
                    found.setdefault(f"{way}_cpu_seconds", []).append(took["cpu_seconds"])
                    found.setdefault(f"{way}_shards", []).append(took["bytes"] / max(sizes))
            subprocess.run(["diff", "-r", str(source), str(back)], check=True)
            figures[kind] = {"bytes": sum(sizes), "shard_bytes": max(sizes), "byte_equal": True}
            figures[kind] |= {name: round(statistics.median(values), 2) for name, values in found.items()}
    return figures


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    rows = ["| model | copy | to a run | memory | back | memory |", "|---|---|---|---|---|---|"]
    for kind in CONFIGS:
        f = figures[kind]
        ways = [f"{f[f'{way}_mb_s']:.0f} MB/s | {f[f'{way}_shards']:.2f} files" for way in ("to_run", "to_hf")]
        rows.append(f"| {kind}, {f['bytes'] / 1e9:.2f} GB | {f['copy_mb_s']:.0f} MB/s | {' | '.join(ways)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    child(*sys.argv[1:])
