"""``dsjax plan`` as a user meets it: answers, files, exit codes, mistakes, the cache, the search."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import pathlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax import cli
from dsjax.config import UserError, apply_overrides, load_config, to_dict
from dsjax.data.tokenizer import train_tokenizer
from dsjax.plan import command, process, search
from dsjax.plan.chips import parse_topology
from dsjax.plan.measure import Job
from dsjax.sharding import MESH_AXES, MeshConfig

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
TINY = str(CONFIGS / "tiny_moe.py")
DIES = ("-c", "import os, signal, sys; print('a cry', file=sys.stderr, flush=True); os.kill(os.getpid(), 6)")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSJAX_CACHE", str(tmp_path / "cache"))


def run(*words: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        cli.main(["plan", *words])
    return int(stop.value.code or 0), out.getvalue(), err.getvalue()


def answer(**changes: Any) -> dict[str, Any]:
    """A plan as the compiler's process would write it."""
    plan = {
        "mode": "train",
        "topology": "v5e:2x2",
        "chip": "v5e",
        "num_chips": 4,
        "num_devices": 4,
        "mesh": {"fsdp": 4},
        "batch_size": 8,
        "length": 64,
        "dtype": "bfloat16",
        "remat": "full",
        "num_params": 10,
        "num_active_params": 10,
        "hbm_bytes_per_chip": 2**30,
        "hbm_breakdown_bytes": {"parameters": 2**28, "optimizer": 2**29, "temporaries": 2**28},
        "hbm_capacity_bytes": int(15.75 * 2**30),
        "fits": True,
        "flops_per_step": 1e12,
        "flops_recomputed": 0.0,
        "flops_wasted": 0.0,
        "flops_optimizer": 0.0,
        "collective_bytes": {"fsdp": {"all-gather": 1e6}},
        "roofline_seconds": {"mxu": 0.1, "hbm": 0.2, "ici": 0.05},
        "bound": "hbm",
        "best_mfu": 0.5,
        "tokens_per_second_bound": 100.0,
        "energy_joules_per_token": {"total": 1.0},
        "compile_seconds": 1.0,
        "notes": [],
    }
    return plan | changes


# ---------------------------------------------------------------- one answer, several


def test_a_plan_for_forced_devices_from_the_command_line(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "plan.json"
    words = (TINY, "--topology", "cpu:4", "--mesh", "fsdp=2,expert=2", "compute.remat=full", "--json", str(target))
    code, said, told = run(*words)
    assert code == 0, told
    plan = json.loads(target.read_text())
    assert plan["mesh"] == {"fsdp": 2, "expert": 2}
    assert plan["remat"] == "full"
    assert plan["fits"] is None
    assert "train on cpu:4: 4 chips, mesh fsdp=2, expert=2, 8 x 64 tokens" in said
    assert "361,920 parameters, 214,464 active" in said
    assert "compiling" in told  # progress
    again = run(*words, "--quiet")
    assert again[0] == 0
    assert again[2] == ""


def test_several_topologies_make_a_table_and_curves(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(job: Job, say: Any, fresh: bool) -> dict[str, Any]:
        topology = parse_topology(job.topology)
        return answer(topology=job.topology, num_chips=topology.num_chips, num_devices=topology.num_devices)

    monkeypatch.setattr(command, "ask", ask)
    plot, target = tmp_path / "plan.png", tmp_path / "plan.json"
    code, said, _ = run(
        TINY, "--topology", "v5e:2x2,v5e:2x4", "--rows-per-chip", "2", "--plot", str(plot), "--json", str(target)
    )
    assert code == 0
    assert [plan["num_chips"] for plan in json.loads(target.read_text())] == [4, 8]
    assert said.count("v5e:2x") == 2
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_rows_per_chip_grow_with_the_chips() -> None:
    request = command.Request(["v5e:2x2", "v5e:2x4"], rows_per_chip=3)
    topologies = [parse_topology(text) for text in request.topologies]
    assert [job.batch_size for job in command.jobs(load_config(TINY), request, topologies)] == [12, 24]


@pytest.mark.parametrize(
    ("words", "mesh"),
    [
        ("fsdp=4,expert=2", {"fsdp": 4, "expert": 2}),
        ("fsdp=4", {"data": 2, "fsdp": 4}),
        ("expert=2,fsdp=-1", {"fsdp": 4, "expert": 2}),
    ],
)
def test_the_mesh_of_the_command_line(words: str, mesh: dict[str, int]) -> None:
    found = command.mesh_for(load_config(TINY), command.Request(["v5e:2x4"], mesh=words), parse_topology("v5e:2x4"))
    sizes = dict(zip(MESH_AXES, found.shape(8), strict=True))
    assert {axis: n for axis, n in sizes.items() if n > 1} == mesh


@pytest.mark.parametrize(
    ("name", "devices", "mesh"),
    [
        ("tiny", 8, {"tensor": 8}),
        ("tiny_moe", 8, {"expert": 8}),
        ("seed_moe_175b", 256, {"expert": 64, "tensor": 4}),
        ("seed_dense_175b", 256, {"data": 8, "tensor": 32}),
    ],
)
def test_inference_gets_a_mesh_of_its_own(name: str, devices: int, mesh: dict[str, int]) -> None:
    found = command.inference_mesh(load_config(CONFIGS / f"{name}.py").model, devices)
    sizes = dict(zip(MESH_AXES, found.shape(devices), strict=True))
    assert {axis: n for axis, n in sizes.items() if n > 1} == mesh


@pytest.mark.parametrize("words", ["model.vocab_size=50258", "model.groups.0.ffn.d_ff=1002"])
def test_the_mesh_of_inference_cuts_every_width(words: str) -> None:
    model = apply_overrides(load_config(CONFIGS / "tiny.py"), [words]).model
    assert command.inference_mesh(model, 8) == MeshConfig(data=-1, tensor=2)


# ---------------------------------------------------------------- the run that it begins with


def test_the_model_is_that_of_the_run_that_training_begins_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """Where that run is not here, a config has to give a model itself."""
    asked = list[Job]()
    monkeypatch.setattr(command, "ask", lambda job, say, fresh: asked.append(job) or answer())
    start, base = tmp_path / "start", load_config(TINY)
    words = ("--topology", "v5e:2x2", "--mesh", "fsdp=4", "--quiet", f"train.start_from={start}")
    recipes = [str(CONFIGS / f"{name}.py") for name in ("preference", "best_of", "code_finetune", "r1_tpu")]
    found = [run(recipe, *words) for recipe in recipes]
    assert [code for code, _, _ in found] == [2, 2, 0, 0]
    assert found[0][2] == f"dsjax: no run folder {start}\n"
    assert [job.config.model for job in asked] == [load_config(recipe).model for recipe in recipes[2:]]

    start.mkdir()
    (start / "config.json").write_text(json.dumps(to_dict(base)))
    (start / "tokenizer.json").write_text(train_tokenizer([], 257).to_json())
    assert [run(recipe, *words)[0] for recipe in recipes] == [0] * 4
    assert run(recipes[0], *words, "method=reward")[0] == 0
    values = [job.config.model.values for job in asked[2:]]
    assert values == ["none", "none", "none", "none", "head"]
    assert {dataclasses.replace(job.config.model, values="none") for job in asked[2:]} == {base.model}


# ---------------------------------------------------------------- too big


def too_big_then_not(job: Job, say: Any = None, fresh: bool = False) -> dict[str, Any]:
    """Fits from 16 chips on."""
    n = parse_topology(job.topology).num_chips
    size = int(31.2 * 2**30) * 4 // n
    mesh = {axis: getattr(job.config.mesh, axis) for axis in MESH_AXES if getattr(job.config.mesh, axis) > 1}
    parts = {"parameters": size // 4, "optimizer": size // 4, "temporaries": size // 2}
    return answer(
        topology=job.topology,
        num_chips=n,
        mesh=mesh,
        batch_size=job.batch_size or 8,
        hbm_bytes_per_chip=size,
        hbm_breakdown_bytes=parts,
        fits=n >= 16,
    )


def test_too_big_is_told_with_the_size_that_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    asked = []

    def ask(job: Job, say: Any, fresh: bool) -> dict[str, Any]:
        asked.append(job.topology)
        return too_big_then_not(job)

    monkeypatch.setattr(command, "ask", ask)
    target = tmp_path / "plan.json"
    code, _, told = run(TINY, "--topology", "v5e:2x2", "--mesh", "fsdp=4", "--quiet", "--json", str(target))
    assert code == 3
    assert (
        told == "dsjax: needs 31.2 GiB a chip, v5e has 15.75; fits from v5e:4x4 (--mesh fsdp=16, data.batch_size=16)\n"
    )
    assert asked == ["v5e:2x2", "v5e:2x4", "v5e:4x4"]
    assert json.loads(target.read_text())["fits"] is False


def test_a_larger_mesh_goes_on_to_cut_experts_over_data(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Job]()
    monkeypatch.setattr(command, "ask", lambda job, say, fresh: asked.append(job) or too_big_then_not(job))
    mesh = "data=2,expert=2,expert_over_data=true"
    told = run(TINY, "--topology", "v5e:2x2", "--mesh", mesh, "--quiet")[2]
    assert "fits from v5e:4x4 (--mesh data=2,fsdp=4,expert=2,expert_over_data=true" in told
    assert all(job.config.mesh.expert_over_data for job in asked)


def test_what_can_not_fit_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(job: Job, say: Any, fresh: bool) -> dict[str, Any]:
        asked.append(job.topology)
        size = 4 * int(100e9) // parse_topology(job.topology).num_chips
        return too_big_then_not(job) | {"hbm_breakdown_bytes": {"parameters": size}}

    monkeypatch.setattr(command, "ask", ask)
    code, _, told = run(TINY, "--topology", "v5e:2x2", "--mesh", "fsdp=4", "--quiet")
    assert code == 3
    assert asked == ["v5e:2x2", "v5e:4x8"]
    assert "fits from v5e:4x8" in told


@pytest.mark.slow
def test_a_model_that_needs_four_chips(tmp_path: pathlib.Path) -> None:
    """1.1 billion parameters and their optimizer are 16.6 GiB."""
    (tmp_path / "big.py").write_text(
        "import dataclasses, sys\n"
        f"sys.path.insert(0, {str(CONFIGS)!r})\n"
        "from tiny import get_config as tiny\n"
        "from dsjax.nn.mlp import MLPConfig\n"
        "from dsjax.nn.attention import AttentionConfig\n"
        "from dsjax.models.decoder import LayerGroup\n\n\n"
        "def get_config():\n"
        "    base = tiny()\n"
        "    attention = AttentionConfig(num_heads=32, num_kv_heads=32, head_dim=128)\n"
        "    groups = (LayerGroup(MLPConfig(d_ff=16384), attention),)\n"
        "    model = dataclasses.replace(base.model, d_model=4096, num_layers=4, groups=groups)\n"
        "    return dataclasses.replace(base, model=model)\n"
    )
    code, _, told = run(str(tmp_path / "big.py"), "--topology", "v5e:1x1", "--mesh", "fsdp=1", "--quiet")
    assert code == 3
    assert "v5e has 15.75; fits from v5e:2x2 (--mesh fsdp=4)" in told


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--topology", "v5e:3x3"), "topology is v5e:3x3; v5e has 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        (("--topology", "v9:2x2"), "topology is v9:2x2; it is CHIP:SHAPE"),
        (("--topology", ""), "it is CHIP:SHAPE"),
        (("--topology", "v5e:2x2", "--mesh", "fsdp=3"), "mesh is fsdp=3: 3 does not divide the 4 devices"),
        (("--topology", "v5e:2x2", "--mesh", "fdsp=4"), "unknown key"),
        (("--topology", "v5e:2x2", "--batch", "0"), "--batch is '0'; it must be whole numbers from 1"),
        (("--topology", "v5e:2x2", "--batch", "1,x"), "--batch is '1,x'; it must be whole numbers from 1"),
        (("--topology", "v5e:2x2", "--length", "0"), "--length is 0; it must be"),
        (("--topology", "v5e:2x2", "--batch", "4", "--rows-per-chip", "1"), "exclude each other"),
        (
            ("--topology", "v5e:2x2", "--json", "no/such/folder.json"),
            "--json is no/such/folder.json: there is no folder",
        ),
        (("--topology", "v5e:2x2", "--plot", "plan.xyz"), "--plot is plan.xyz; its name must end in one of ."),
        (("--topology", "v5e:2x2,v5e:4x4", "--search"), "--search takes one topology"),
        (("--topology", "v5e:2x2", "--search", "--mesh", "fsdp=4"), "--search tries meshes, but --mesh names fsdp=4"),
        (("--topology", "cpu:4", "--batch", "6", "--quiet"), "data.batch_size / train.accumulate is 6; it must divide"),
        (("--topology", "cpu:4", "--mode", "decode", "--mesh", "data=4", "--quiet"), "batch_size is 1; it must divide"),
    ],
)
def test_a_mistake_is_one_sentence(words: tuple[str, ...], sentence: str) -> None:
    code, _, told = run(TINY, *words)
    assert code == 2
    assert told.count("\n") == 1
    assert told.startswith("dsjax: ")
    assert sentence in told


def test_what_is_no_recipe_can_not_be_planned() -> None:
    with pytest.raises(UserError, match="a MeshConfig can not be planned; it is no recipe"):
        command.run(MeshConfig(), command.Request(["cpu:1"]))


def test_a_compiler_that_dies_is_told_and_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(process, "COMMAND", DIES)
    with pytest.raises(UserError, match=r"the compiler for cpu:2 died \(SIGABRT\); it said: a cry"):
        process.ask(Job(load_config(TINY), "cpu:2", "train"))
    assert not list(tmp_path.rglob("*.json"))


def test_an_error_of_python_is_told_as_it_is() -> None:
    """Not JAX's note on the frames that it has removed, which comes behind it."""
    fails = "import jax; jax.jit(lambda x: x.no_such_thing)(1.0)"
    answer, died, last = process.answer_of(("-c", fails), "", parse_topology("cpu:1"), lambda text: None)
    assert (answer, died) == (None, "")
    assert last.startswith("AttributeError: ")
    assert "no_such_thing" in last


def test_without_libtpu_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dsjax\[plan\]'"):
        process.ask(Job(load_config(TINY), "v5e:1x1", "train"))


# ---------------------------------------------------------------- the cache


def writes(result: dict[str, Any]) -> tuple[str, str]:
    return "-c", f"import pathlib, sys; pathlib.Path(sys.argv[2]).write_text({json.dumps(result)!r})"


def test_an_answer_is_kept_until_the_question_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(load_config(TINY), "cpu:2", "train")
    monkeypatch.setattr(process, "COMMAND", writes({"answer": 1}))
    assert process.ask(job) == {"answer": 1}
    monkeypatch.setattr(process, "COMMAND", writes({"answer": 2}))
    assert process.ask(job) == {"answer": 1}
    assert process.ask(Job(load_config(TINY), "cpu:2", "decode")) == {"answer": 2}
    assert process.ask(job, fresh=True) == {"answer": 2}
    monkeypatch.setattr(process, "fingerprint", lambda: "another version")
    monkeypatch.setattr(process, "COMMAND", writes({"answer": 3}))
    assert process.ask(job) == {"answer": 3}


def test_a_damaged_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    job = Job(load_config(TINY), "cpu:2", "train")
    monkeypatch.setattr(process, "COMMAND", writes({"answer": 1}))
    process.ask(job)
    (kept,) = (tmp_path / "cache" / "plan").iterdir()
    kept.write_text('{"answer": ')
    assert process.ask(job) == {"answer": 1}
    assert json.loads(kept.read_text()) == {"answer": 1}


# ---------------------------------------------------------------- the search


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["tiny_moe", "seed_moe_175b", "seed_dense_175b"]),
    topology=st.sampled_from(["v5e:2x2", "v5e:8x8", "v5p:4x8x8", "tpu7x:2x2x1"]),
    mode=st.sampled_from(["train", "prefill", "decode"]),
    batch=st.sampled_from([1, 8, 256, 1024]),
)
def test_candidates_use_all_devices_and_divide(name: str, topology: str, mode: Any, batch: int) -> None:
    config, place = load_config(CONFIGS / f"{name}.py"), parse_topology(topology)
    found = []
    with contextlib.suppress(UserError):  # nothing fits, or nothing divides
        found = search.candidates(Job(config, topology, mode), place, [batch])
    keys = set()
    for one in found:
        sizes = {axis: getattr(one.job.config.mesh, axis) for axis in MESH_AXES}
        assert math.prod(sizes.values()) == place.num_devices
        assert one.bytes > 0
        assert one.seconds > 0
        keys.add(one.override())
    assert len(keys) == len(found)
    order = [one.seconds / (one.job.batch_size or 1) for one in found]
    assert order == sorted(order)


def test_what_a_search_of_training_prints_is_what_it_compiled() -> None:
    """Batch, length and what the mesh says beside sizes are those of the candidate."""
    config, place = load_config(TINY), parse_topology("v5e:2x2")
    config = dataclasses.replace(config, mesh=MeshConfig(expert_over_data=True))
    found = search.candidates(Job(config, "v5e:2x2", "train", length=128), place, (8, 64))
    assert len({one.override() for one in found}) == len(found)
    for one in found:
        there = apply_overrides(config, one.override().split())
        assert there.compute == one.job.config.compute
        assert there.mesh == one.job.config.mesh
        assert (there.data.batch_size, there.data.seq_len) == (one.job.batch_size, 128)
    assert {one.job.batch_size for one in found} == {8, 64}


def test_a_search_takes_rows_per_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "ask", lambda job, say, fresh: answer(mode="decode", batch_size=job.batch_size))
    words = ("--topology", "v5e:2x2", "--mode", "decode", "--search", "--rows-per-chip", "3", "--length", "128")
    code, said, _ = run(TINY, *words, "--quiet")
    assert code == 0
    assert said.count("--batch 12 --length 128") == said.count("--batch") > 1


def test_what_fits_nowhere_is_said_before_anything_is_compiled() -> None:
    base = Job(load_config(CONFIGS / "seed_dense_175b.py"), "v5e:2x2", "train")
    with pytest.raises(UserError, match=r"nothing fits on v5e:2x2: even mesh=.* needs about .* GiB a chip"):
        search.candidates(base, parse_topology("v5e:2x2"))


@pytest.mark.slow
def test_a_search_prints_what_to_type(tmp_path: pathlib.Path) -> None:
    target, plot = tmp_path / "search.json", tmp_path / "search.png"
    words = (TINY, "--topology", "cpu:2", "--quiet")
    code, said, told = run(*words, "--search", "--limit", "2", "--json", str(target), "--plot", str(plot))
    assert code == 0, told
    result = json.loads(target.read_text())
    assert len(result["compiled"]) == 2
    assert f"candidates): {result['best']}" in said
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert run(*words, *result["best"].split())[0] == 0


def test_a_search_for_inference_prints_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "ask", lambda job, say, fresh: answer(mode="decode", batch_size=job.batch_size))
    code, said, told = run(
        TINY, "--topology", "v5e:2x2", "--mode", "decode", "--search", "--limit", "3", "--batch", "4"
    )
    assert code == 0
    assert "the compiler tries the 3 that look best" in told
    assert "--mesh data=" in said
    assert "--batch 4" in said
