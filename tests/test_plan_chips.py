"""Chips and topologies: figures against libtpu, shapes, rings, bandwidth, energy, and the page that shows them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
import types
from typing import Any

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.config import UserError
from dsjax.plan import chips
from dsjax.plan.chips import CHIPS, energy_joules, ici_bandwidth, larger, parse_topology, topology_options, wraps
from dsjax.train import peak

ROOT = pathlib.Path(__file__).parent.parent
TPUS = [name for name, chip in CHIPS.items() if chip.torus_dims]

# Describes each topology, and has libtpu refuse a program that is far too large for one device of it. In a process of
# its own, because libtpu ends the process when it does not like a topology.
PROBE = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

answers = {}
for options in json.loads(sys.argv[1]):
    if "chips_per_host_bounds" in options:
        options["chips_per_host_bounds"] = tuple(options["chips_per_host_bounds"])
    devices = topologies.get_topology_desc(**options).devices
    coords = [max(d.coords[i] for d in devices) + 1 for i in range(3)]
    whole = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    too_large = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32, sharding=whole)
    try:
        jax.jit(lambda x: x + 1).lower(too_large).compile()
        message = "it fits"
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
    limit = re.search(r"available HBM \\(([0-9.]+)G\\)|Used [0-9.]+G of ([0-9.]+)G hbm", message)
    answers[options["topology_name"]] = [len(devices), coords, limit and float(limit[1] or limit[2]), message[:200]]
print(json.dumps(answers))
"""


def probed(name: str) -> list[str]:
    """The smallest topologies of a chip, some of its largest, and the most stretched one."""
    valid = chips.valid_topologies(name)
    return list(dict.fromkeys([*valid[:7], valid[-2], valid[-1], str(larger(parse_topology(valid[0]))[-1])]))


@pytest.fixture(scope="module")
def libtpu_says() -> dict[str, Any]:
    pytest.importorskip("libtpu")
    wanted = [topology_options(parse_topology(text)) for name in TPUS for text in probed(name)]
    alone = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, "-c", PROBE, json.dumps(wanted)]
    ran = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout)


@pytest.mark.parametrize("name", TPUS)
def test_libtpu_takes_the_topologies(name: str, libtpu_says: dict[str, Any]) -> None:
    for text in probed(name):
        topology = parse_topology(text)
        num_devices, coords, _, _ = libtpu_says[text]
        assert num_devices == topology.num_devices, text
        assert coords[: len(topology.dims)] == list(topology.dims), text


@pytest.mark.parametrize("name", TPUS)
def test_usable_memory_is_what_libtpu_allows(name: str, libtpu_says: dict[str, Any]) -> None:
    for text in probed(name):
        _, _, gib, message = libtpu_says[text]
        assert gib is not None, message
        # libtpu prints two decimals, and keeps 0.01 more for itself in the longest slices
        assert CHIPS[name].hbm_bytes_per_device == pytest.approx(gib * chips.GIB, abs=0.015 * chips.GIB), text
    assert CHIPS[name].hbm_bytes < CHIPS[name].hbm_nominal_bytes


def test_a_shape_is_read() -> None:
    topology = parse_topology("v5p:4x8x8")
    assert (topology.chip.name, topology.dims, topology.num_chips, topology.num_devices) == ("v5p", (4, 8, 8), 256, 256)
    assert parse_topology("tpu7x:4x4x8").num_devices == 256, "two devices a chip"
    assert parse_topology("h100:8").dims == (8,)
    assert parse_topology("cpu:6").num_devices == 6
    assert str(parse_topology(" V5E:4X4 ")) == "v5e:4x4"


@pytest.mark.parametrize("name", CHIPS)
def test_every_valid_topology_is_read_and_they_are_in_order_of_size(name: str) -> None:
    valid = [parse_topology(text) for text in chips.valid_topologies(name)]
    assert [str(t) for t in valid] == chips.valid_topologies(name)
    assert [t.num_chips for t in valid] == sorted(t.num_chips for t in valid)
    assert valid[-1].num_chips == CHIPS[name].max_chips
    assert len(set(valid)) == len(valid)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5e:3x3", ["topology is v5e:3x3; v5e has 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"]),
        ("v5e:32x32", ["v5e:32x32", "16x16"]),
        ("v5p:8x4x4", ["v5p:8x4x4", "the nearest are v5p:4x4x8,", "at most 6144 chips"]),
        ("v5p:3x8x8", ["v5p:4x4x12", "AxBxC of multiples of 4"]),
        ("v5p:16x20x28", ["v5p:16x20x28", "at most 6144 chips"]),
        ("v5p:4x4", ["v5p:4x4;", "v5p:2x2x4"]),
        ("v4:1x1x1", ["v4 has 2x2x1,"]),
        ("v5e:4xfour", ["v5e:4xfour", "v5e has 1x1"]),
        ("v5e:04x4", ["v5e has 1x1"]),
        ("v5e:", ["v5e has 1x1"]),
        ("v5p-128", ["v5p-128", "CHIP:SHAPE", "v4, v5e, v5p, v6e, tpu7x, h100, cpu"]),
        ("v9:2x2", ["v9:2x2", "v4, v5e, v5p, v6e, tpu7x, h100, cpu"]),
        ("h100:16", ["h100:16", "h100 has 1, 2, 4, 8"]),
        ("cpu:0", ["cpu:0", "from 1 to 256"]),
        ("cpu:" + "9" * 5000, ["from 1 to 256"]),
        ("", ["CHIP:SHAPE"]),
    ],
)
def test_an_impossible_topology_names_the_possible_ones(text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as wrong:
        parse_topology(text)
    message = str(wrong.value)
    assert message.startswith("topology is ")
    assert text[:30] in message
    assert not [word for word in words if word not in message], message
    assert "\n" not in message
    assert len(message) < 400


@given(st.text(max_size=30))
def test_any_text_is_a_topology_or_a_mistake_of_the_users(text: str) -> None:
    try:
        topology = parse_topology(text)
    except UserError as wrong:
        assert len(str(wrong).splitlines()) == 1  # noqa: PT017 any of the two is right
    else:
        assert str(topology) in chips.valid_topologies(topology.chip.name)


def test_topologies_of_an_unknown_chip() -> None:
    with pytest.raises(UserError, match="chip is v9; chips are v4, v5e"):
        chips.valid_topologies("v9")


def test_only_a_tpu_has_options_for_libtpu() -> None:
    assert topology_options(parse_topology("v4:2x2x2"))["chip_config_name"] == "megacore"
    with pytest.raises(ValueError, match="cpu:8"):
        topology_options(parse_topology("cpu:8"))


def test_the_next_sizes_up() -> None:
    def names(text: str) -> list[str]:
        return [str(t) for t in larger(parse_topology(text))]

    assert names("v5e:2x2") == ["v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"]
    assert names("v5p:4x4x12")[:2] == ["v5p:4x8x12", "v5p:8x8x12"]
    assert names("v5p:16x16x16") == ["v5p:16x16x24"]
    assert names("h100:2") == ["h100:4", "h100:8"]
    assert names("v5e:16x16") == []


@pytest.mark.parametrize("name", CHIPS)
def test_sizes_grow_by_about_two_up_to_the_largest(name: str) -> None:
    for text in chips.valid_topologies(name)[::17]:
        counts = [parse_topology(text).num_chips, *(t.num_chips for t in larger(parse_topology(text)))]
        assert counts[-1] == CHIPS[name].max_chips
        # from one chip to a host of four; the last step may be a small one
        assert all(1 < b / a <= (4 if a == 1 else 2) for a, b in itertools.pairwise(counts))


def test_rings() -> None:
    def closed(text: str) -> list[bool]:
        topology = parse_topology(text)
        return [wraps(topology, dim) for dim in range(len(topology.dims))]

    assert closed("v5e:16x16") == [True, True]
    assert closed("v6e:8x16") == [False, True]
    assert closed("v5p:4x4x4") == [True, True, True]
    assert closed("v5p:2x4x4") == [False, False, False], "switches join whole blocks"
    assert closed("h100:8") == [False]


def test_bandwidth_of_a_collective() -> None:
    # by hand: a link of v5e is 45 GB/s one way, of v5p 90
    assert ici_bandwidth(parse_topology("v5e:16x16"), {0}) == 90e9
    assert ici_bandwidth(parse_topology("v5e:16x16"), {0, 1}) == 180e9
    assert ici_bandwidth(parse_topology("v5e:8x16"), {0, 1}) == 135e9
    assert ici_bandwidth(parse_topology("v5e:4x4"), {0}) == 45e9
    assert ici_bandwidth(parse_topology("v5p:4x8x8"), {0, 1, 2}) == 540e9
    assert ici_bandwidth(parse_topology("v5p:2x2x1"), {0, 1, 2}) == 180e9, "one chip deep: no link"
    assert ici_bandwidth(parse_topology("v5e:1x1"), {0, 1}) == 0
    assert ici_bandwidth(parse_topology("tpu7x:4x4x4"), {2}) == 90e9, "two devices share the chip's links"
    assert ici_bandwidth(parse_topology("h100:8"), {0}) == 450e9
    assert ici_bandwidth(parse_topology("h100:1"), {0}) == 0
    assert ici_bandwidth(parse_topology("cpu:8"), {0}) is None


@pytest.mark.parametrize("name", TPUS)
def test_all_links_of_a_closed_torus_are_the_links_of_the_chip(name: str) -> None:
    largest = larger(parse_topology(chips.valid_topologies(name)[0]))[-1]
    for_chip = ici_bandwidth(largest, range(3)[: len(largest.dims)]) * largest.chip.devices_per_chip
    assert for_chip == largest.chip.ici_links * largest.chip.ici_link_bandwidth


def test_energy_by_hand() -> None:
    joules = energy_joules(CHIPS["v5p"], flops=1e12, hbm_bytes=1e9, ici_bytes=1e9)
    assert joules == pytest.approx({"mxu": 0.295, "hbm": 0.04375, "ici": 0.064, "total": 0.40275})
    assert energy_joules(CHIPS["cpu"], 1.0, 1.0, 1.0) is None


def test_a_v4_at_its_limits_uses_about_what_was_measured() -> None:
    """Google measured 90 W at least and 192 W at most (docs.cloud.google.com/tpu/docs/v4)."""
    v4 = CHIPS["v4"]
    watts = energy_joules(v4, v4.peak_flops["bf16"], v4.hbm_bandwidth, v4.ici_links * v4.ici_link_bandwidth)
    assert 90 < watts["total"] < 192


@pytest.mark.parametrize("name", [*TPUS, "h100"])
def test_every_figure_has_a_source(name: str) -> None:
    chip = CHIPS[name]
    figures = {field.name for field in dataclasses.fields(chip)} - {"name", "torus_dims", "sources"}
    if name == "h100":
        figures -= {"vmem_bytes", "tensor_cores"}
    assert not [figure for figure in figures if getattr(chip, figure) is None or not chip.sources.get(figure)]
    assert chip.peak("bf16") > 0
    assert chip.peak("f64") is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("v4", "TPU v4"), ("v5e", "TPU v5 lite"), ("v5e", "TPU v5e"), ("v5p", "TPU v5"), ("v5p", "TPU v5p"),
        ("v6e", "TPU v6 lite"), ("v6e", "TPU v6e"), ("tpu7x", "TPU7x"), ("h100", "NVIDIA H100 80GB HBM3"),
    ],
)  # fmt: skip
def test_a_run_measures_itself_against_the_same_peak(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind, platform="it has")])
    assert peak.matmul_peak_flops.__wrapped__() == CHIPS[name].peak() / CHIPS[name].devices_per_chip


@pytest.mark.parametrize(("platform", "flops"), [("cpu", 10.0), ("gpu", 80.0)])
def test_only_the_devices_of_a_cpu_share_what_was_measured(
    platform: str, flops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="another", platform=platform)])
    monkeypatch.setattr(jax, "local_device_count", lambda: 8)
    monkeypatch.setattr(peak, "measured_matmul_flops", lambda dtype: 80.0)
    assert peak.matmul_peak_flops.__wrapped__() == flops


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "chips.md").read_text(encoding="utf-8")
    assert page == chips.replace_section(page), "run: python -m dsjax.plan.chips docs/chips.md"
