"""What a plan says, against what a run does, hand arithmetic, and the compilers."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import apply_overrides, load_config
from dsjax.data.prepare import DataConfig
from dsjax.models.decoder import ComputeConfig, DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.masks import Segmented
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.plan import measure as measuring
from dsjax.plan.chips import CHIPS, parse_topology
from dsjax.plan.measure import Job, measure
from dsjax.plan.programs import make_program
from dsjax.plan.roofline import make_roofline, seconds_of, spanned
from dsjax.plan.traffic import Collective
from dsjax.sharding import MeshConfig
from dsjax.train.preference import Preference
from dsjax.train.pretrain import Pretrain, TrainConfig, batch_shapes, build

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
KEYS = {
    "num_params",
    "num_active_params",
    "num_chips",
    "mesh",
    "hbm_bytes_per_chip",
    "hbm_breakdown_bytes",
    "hbm_capacity_bytes",
    "fits",
    "flops_per_step",
    "flops_recomputed",
    "collective_bytes",
    "roofline_seconds",
    "bound",
    "best_mfu",
    "tokens_per_second_bound",
    "compile_seconds",
}


def config(name: str = "tiny_moe", *overrides: str, **mesh: int) -> Pretrain:
    return dataclasses.replace(
        apply_overrides(load_config(CONFIGS / f"{name}.py"), overrides), mesh=MeshConfig(**mesh or {"data": -1})
    )


DENSE = DecoderConfig(
    vocab_size=1024,
    d_model=512,
    num_layers=6,
    groups=(LayerGroup(MLPConfig(d_ff=2048), AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=128)),),
)


def dense(**mesh: int) -> Pretrain:
    """A plain model whose weights can be summed by hand."""
    return Pretrain(
        model=DENSE,
        data=DataConfig(vocab_size=1024, seq_len=256, batch_size=8),
        compute=ComputeConfig(dtype="bfloat16", remat="full", loss_chunk=256),
        mesh=MeshConfig(**mesh),
    )


@pytest.mark.parametrize(("method", "compared"), [("dpo", 2), ("reward", 0)])
def test_the_step_of_a_recipe_is_its_own(method: Any, compared: int) -> None:
    """Here that of preferences, with its loss, and a reference of both texts where the method has one."""
    base = dense(data=1)
    given = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    given |= {"method": method, "train": TrainConfig(start_from="run")}
    given["model"] = dataclasses.replace(base.model, num_layers=1, values="head" if method == "reward" else "none")
    program = make_program(Preference(**given), "train", jax.devices()[:1], batch_size=8, length=16)
    assert "loss/preference" in program.traced.out_info[1]
    assert program.bytes_by_part["batch"] == 4 * (8 * 16 * 5 + 8 * compared)


# ---------------------------------------------------------------- against the run


@pytest.mark.parametrize("mesh", [{"data": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}])
def test_the_planned_memory_is_what_the_run_takes(mesh: dict[str, int]) -> None:
    cfg = config(**mesh)
    plan = measure(Job(cfg, "cpu:8", "train"))
    assert plan.keys() >= KEYS
    placed, trainer = build(cfg, jax.devices())
    state = trainer.init(0)

    def held(tree: Any) -> int:
        device = jax.devices()[0]
        shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device]
        return sum(s.data.nbytes for s in shards)

    found = plan["hbm_breakdown_bytes"]
    assert found["parameters"] == held(state.params)
    assert found["optimizer"] == held(state.opt_state)
    assert found["buffers"] == held(state.buffers)
    stats = (
        trainer.step.lower(trainer.shapes, batch_shapes(cfg, placed), jax.ShapeDtypeStruct((), jnp.int32))
        .compile()
        .memory_analysis()
    )
    taken = stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    kept = stats.output_size_in_bytes - stats.alias_size_in_bytes
    assert plan["hbm_bytes_per_chip"] == pytest.approx(taken + kept, rel=0.01)
    assert sum(found.values()) == plan["hbm_bytes_per_chip"]
    assert plan["mesh"] == {axis: size for axis, size in placed.shape.items() if size > 1}
    assert plan["fits"] is None


RUN = """
import ctypes, json, pathlib, re, sys, time
import jax, jax.numpy as jnp
from test_plan import allocating
from dsjax.train.pretrain import batch_shapes, build
def status(key):
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and is kept for the next allocation is no one's
    return int(re.search(key + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
cfg = allocating()
mesh, trainer = build(cfg, jax.devices())
batch = batch_shapes(cfg, mesh)
step = trainer.step.lower(trainer.shapes, batch, jax.ShapeDtypeStruct((), jnp.int32)).compile()
init = trainer.init.lower(0).compile()
before = status("VmRSS")
state = init(0)
data = jax.tree.map(lambda s: jax.device_put(jnp.ones(s.shape, s.dtype), s.sharding), batch)
jax.block_until_ready((state, data))
held = []
for _ in range(10):  # what computed it lets go of its room a moment after the result is there
    time.sleep(0.1)
    held.append(status("VmRSS") - before)
resident = min(held)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
jax.block_until_ready(step(state, data, jnp.int32(10)))
print(json.dumps({"state": resident, "step": status("VmHWM") - before}))
"""


def allocating() -> Pretrain:
    """Large enough that what else a process does hardly counts."""
    attention = AttentionConfig(num_heads=8, num_kv_heads=8, head_dim=64)
    model = DecoderConfig(2048, d_model=512, num_layers=8, groups=(LayerGroup(MLPConfig(d_ff=2048), attention),))
    data = DataConfig(vocab_size=2048, seq_len=256, batch_size=16)
    return Pretrain(model=model, data=data, mesh=MeshConfig(data=2, fsdp=4))


def test_the_planned_memory_is_what_the_process_really_gets() -> None:
    import json

    plan = measure(Job(allocating(), "cpu:8", "train"))
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True, env=with_paths())
    real = json.loads(done.stdout)
    parts = plan["hbm_breakdown_bytes"]
    assert real["state"] / 8 == pytest.approx(parts["parameters"] + parts["optimizer"] + parts["batch"], rel=0.02)
    # Devices do not reach their peaks at the same moment, and pages that are never touched are never there.
    assert 0.6 < real["step"] / 8 / plan["hbm_bytes_per_chip"] < 1.15


def with_paths() -> dict[str, str]:
    root = pathlib.Path(__file__).parent.parent
    paths = [str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")]
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    # One arena of malloc: as many as threads, each with what it keeps for later, are a tenth of the whole.
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "XLA_FLAGS": flags, "MALLOC_ARENA_MAX": "1"}


# ---------------------------------------------------------------- against hand arithmetic


def test_a_dense_model_by_hand() -> None:
    plan = measure(Job(dense(fsdp=4), "v5e:2x2", "train"))
    layer = 4 * 512 * 512 + 3 * 512 * 2048
    weights, norms, vocabulary = 6 * layer, (2 * 6 + 1) * 512, 1024 * 512
    assert plan["num_params"] == plan["num_active_params"] == weights + norms + 2 * vocabulary
    parts = plan["hbm_breakdown_bytes"]
    cut = weights + 2 * vocabulary
    assert parts["parameters"] == pytest.approx(4 * cut / 4, rel=0.01)
    assert parts["optimizer"] == pytest.approx(8 * cut / 4, rel=0.01)
    assert parts["batch"] == 5 * 4 * 8 * 256 / 4
    # Every gradient in float32 and the input of every layer in bfloat16; some of it is in VMEM, which v5e has much of.
    assert 0 < parts["gradients_and_activations"] <= 1.15 * (4 * cut / 4 + 6 * 2 * 256 * 512 * 2)

    tokens = 8 * 256
    pairs = 6 * 512 * (256 + 1) / 2
    assert plan["tokens_per_step"] == tokens
    assert plan["flops_per_step"] == pytest.approx(3 * tokens * (2 * (weights + vocabulary) + 4 * pairs), rel=1e-3)
    # Computed again: the forward pass of the layers but for the last product of each, which nothing asks for.
    forward = tokens * (2 * weights + 4 * pairs)
    assert 0.6 * forward < plan["flops_recomputed"] < forward

    executed = sum(plan[f"flops_{kind}"] for kind in ("per_step", "recomputed", "wasted", "optimizer"))
    assert plan["roofline_seconds"]["mxu"] == pytest.approx(executed / 4 / 197e12)
    fsdp = plan["collective_bytes"]["fsdp"]
    # Forward and backward pass gather every matrix of a layer, in bfloat16; each device sends 3/4 of the whole.
    once = 3 / 4 * 2 * weights
    assert 1.6 * once < fsdp["all-gather"] < 3 * once + 8 * vocabulary
    assert set(plan["collective_bytes"]) == {"fsdp"}
    slowest = max(plan["roofline_seconds"].values())
    assert plan["roofline_seconds"][plan["bound"]] == slowest
    assert plan["tokens_per_second_bound"] == pytest.approx(tokens / slowest)
    assert plan["best_mfu"] == pytest.approx(plan["flops_per_step"] / slowest / 4 / 197e12)
    assert plan["fits"] is True


def test_more_chips_share_the_state() -> None:
    four, eight = (make_program(dense(fsdp=n), "train", jax.devices()[:n]).bytes_by_part for n in (4, 8))
    assert eight["parameters"] == pytest.approx(four["parameters"] / 2, rel=0.02)
    assert eight["optimizer"] == pytest.approx(four["optimizer"] / 2, rel=0.02)


@pytest.mark.parametrize(("num_layers", "top", "num_heads"), [(5, None, 8), (5, 3, 8), (4, 3, 1), (5, 3, 1)])
def test_decoding_with_segments_reads_half_of_the_cache_or_what_is_chosen(
    num_layers: int, top: int | None, num_heads: int
) -> None:
    """No slots are copied to be read, also where layers differ in turn and do not come out even."""
    attention = AttentionConfig(num_heads, num_heads, 128, segmented=Segmented(1024, top_segments=top))
    model = DecoderConfig(1024, 1024, num_layers, groups=(LayerGroup(MLPConfig(d_ff=128), attention),))
    job, length, batch = dataclasses.replace(dense(data=1), model=model), 65_536, 8
    moved = measure(Job(job, "v5e:1x1", "decode", batch_size=batch, length=length))["hbm_traffic_bytes"]
    # Of chosen tails: the first, the previous, `top` others, and its own, in pages that hold nothing else.
    slots = 512 + (length // 2 if top is None else (3 + top) * 512)
    weights, cache = model.num_params() * 2, num_layers * batch * slots * 2 * num_heads * 128 * 2
    # Weights may be brought into VMEM first, which counts twice; sums of tails are read and written.
    assert weights + cache <= moved["read"] < 2 * weights + 1.1 * cache
    assert moved["by_scope"]["attention"] < 1.1 * (cache + weights)
    assert moved["written"] < 0.1 * (weights + cache)


def test_decoding_reads_what_it_needs_once() -> None:
    """Of a stack of layers nothing is copied to be read: no expert without a row, and no cache to be written."""
    attention = AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=128)
    experts = MoEConfig(num_experts=32, top_k=2, d_ff=1024)
    model = DecoderConfig(2048, d_model=1024, num_layers=6, groups=(LayerGroup(experts, attention),))
    base = dataclasses.replace(dense(data=1, tensor=4), model=model)
    rows, length = 4, 4096
    # On a v5e a stack of this size would be brought to VMEM whole, of which it has twice as much.
    plan = measure(Job(base, "v5p:2x2x1", "decode", rows, length))
    layer = 1024 * 128 * (2 * 8 + 2 * 4) + 3 * 1024 * 1024 * 32 * (1 - (31 / 32) ** (2 * rows))
    weights = 2 * (6 * layer + 1024 * 2048) / 4
    cache = 6 * rows * length * 2 * 128 * 2  # the device's one key/value head
    moved = plan["hbm_traffic_bytes"]
    assert 0.9 * (weights + cache) < moved["read"] < 1.3 * (weights + cache)
    assert moved["written"] < 0.1 * (weights + cache)
    assert plan["flops_per_step"] == pytest.approx(plan["flops_of_config"], rel=0.03)
    assert plan["hbm_breakdown_bytes"]["cache"] == pytest.approx(cache, rel=0.01)
    scopes = moved["by_scope"]
    assert sum(scopes.values()) == moved["read"] + moved["written"]
    assert scopes["experts"] == pytest.approx(2 * 6 * 3 * 1024 * 1024 * 32 * (1 - (31 / 32) ** (2 * rows)) / 4, rel=0.1)
    assert scopes["attention"] == pytest.approx(cache + 2 * 6 * 1024 * 128 * (2 * 8 + 2 * 4) / 4, rel=0.3)


def test_llama_2_7b_on_eight_v5e() -> None:
    """JetStream served 88 sequences of 2,048 there, with 3,062 output tokens a second (address: docs/plan.md)."""
    cfg = config("llama2_7b", data=1, tensor=8)
    plan = measure(Job(cfg, "v5e:2x4", "decode", 88, 2048))
    weights, cache = 2 * plan["num_params"] / 8, 2 * 32 * 4096 * 2 * 88 * 2048 / 8
    assert plan["fits"] is True
    assert plan["hbm_bytes_per_chip"] == pytest.approx(weights + cache, rel=0.02)
    assert plan["bound"] == "hbm"
    assert plan["tokens_per_second_bound"] == pytest.approx(88 * 819e9 / (weights + cache), rel=0.03)
    assert plan["tokens_per_second_bound"] > 3062


# ---------------------------------------------------------------- the roofline


def collective(groups: list[list[int]], size: float = 90e9, times: int = 2) -> Collective:
    return Collective("all-gather", ("fsdp",), len(groups[0]), size, times, np.array(groups))


def test_a_collective_uses_the_links_of_the_dimensions_that_it_spans() -> None:
    topology = parse_topology("v5p:4x4x4")
    places = np.array([(x, y, z) for x in range(4) for y in range(4) for z in range(4)])
    line = [[16 * x + 4 * y + z for z in range(4)] for x in range(4) for y in range(4)]
    plane = [[16 * x + i for i in range(16)] for x in range(4)]
    assert spanned(np.array(line), places) == {2}
    assert spanned(np.array(plane), places) == {1, 2}
    # A closed ring sends 90 GB/s both ways.
    assert seconds_of(collective(line), topology, places) == pytest.approx(2 * 90 / 180)
    assert seconds_of(collective(plane), topology, places) == pytest.approx(2 * 90 / 360)


def test_the_longest_of_three_bounds() -> None:
    topology = parse_topology("v5e:1x1")
    chip = CHIPS["v5e"]
    line = make_roofline(topology, flops=197e12, hbm_bytes=2 * chip.hbm_bandwidth, collectives=[], places=None)
    assert (line.mxu, line.hbm, line.ici) == pytest.approx((1, 2, 0))
    assert (line.bound, line.seconds) == ("hbm", pytest.approx(2))


def test_a_cpu_has_no_roofline() -> None:
    line = make_roofline(parse_topology("cpu:8"), flops=1e9, hbm_bytes=1e9, collectives=[], places=None)
    assert (line.mxu, line.hbm, line.ici, line.bound, line.seconds) == (None,) * 5


# ---------------------------------------------------------------- what does not fit


class _TooBig:
    def __init__(self, message: str):
        self.message = message

    def compile(self) -> None:
        raise RuntimeError(self.message)


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.00G)"
            " exceeds available HBM (15.75G).",
            18 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 31.25G of"
            " 15.75G hbm. Exceeded hbm capacity by 15.50G.",
            31.25 * 2**30,
        ),
    ],
)
def test_what_the_compiler_says_of_too_large_programs_is_understood(message: str, size: float) -> None:
    assert measuring.compile_or_need(_TooBig(message)) == (None, size)


def test_another_failure_of_the_compiler_is_one() -> None:
    with pytest.raises(RuntimeError, match="INTERNAL"):
        measuring.compile_or_need(_TooBig("INTERNAL: something else"))


# ---------------------------------------------------------------- GPU


def test_a_gpu_gets_what_can_be_known_without_one() -> None:
    plan = measure(Job(config(fsdp=2, expert=2), "h100:4", "train"))
    cpu = measure(Job(config(fsdp=2, expert=2), "cpu:4", "train"))
    assert plan["flops_per_step"] == cpu["flops_per_step"]
    assert plan["collective_bytes"] == cpu["collective_bytes"]
    assert plan["roofline_seconds"].keys() == {"mxu", "hbm", "ici"}
    assert plan["fits"] is True
    assert any("no GPU compiler is here" in note for note in plan["notes"])


# ---------------------------------------------------------------- the seed's models


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("seed_moe_175b", 175e9, 35e9), ("seed_dense_175b", 175e9, 175e9), ("seed_dense_35b", 35e9, 35e9)],
)
def test_the_seeds_models_have_the_size_it_says(name: str, total: float, active: float) -> None:
    model = load_config(CONFIGS / f"{name}.py").model
    assert model.num_params() == pytest.approx(total, rel=0.02)
    assert model.num_active_params() == pytest.approx(active, rel=0.02)
    assert load_config(CONFIGS / f"{name}.py").data.seq_len == 4096


@pytest.mark.slow
def test_the_seeds_mixture_compiles_for_256_chips_and_fits() -> None:
    plan = measure(Job(load_config(CONFIGS / "seed_moe_175b.py"), "v5p:4x8x8", "train"))
    assert plan["fits"] is True
    assert plan["compile_seconds"] < 240
    assert plan["flops_per_step"] == pytest.approx(plan["flops_of_config"], rel=0.03)
