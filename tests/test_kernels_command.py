"""``dsjax kernels`` as a user meets it: report, tile search, mistakes, cache; and splash attention for real."""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import re
import shutil
from typing import Any

import numpy as np
import pytest

from dsjax import cli
from dsjax.config import UserError
from dsjax.plan import kernels_attention, kernels_command
from dsjax.plan.chips import CHIPS
from dsjax.plan.kernels import Case, clock
from dsjax.plan.schedule import DELAY_SLOTS
from pallas_kernels.segmented_attention import Segments
from pallas_kernels.segmented_attention.tile_table import TABLE
from pallas_kernels.segmented_attention.tiles import Tiles

ROOT = pathlib.Path(__file__).parent.parent
DIES = ("-c", "import os, sys; print('a cry', file=sys.stderr, flush=True); os.kill(os.getpid(), 6)")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSJAX_CACHE", str(tmp_path / "cache"))


def run(*words: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        cli.main(["kernels", *words])
    return int(stop.value.code or 0), out.getvalue(), err.getvalue()


def result(case: Case, cycles: dict[str, int] | int) -> dict[str, Any]:
    """What the compiler's process would write; 10 cycles of each of splash's kernels are skipped steps."""
    by_name = cycles if isinstance(cycles, dict) else {"kernel": cycles}
    skipped = 10 if case.implementation == "splash" else 0
    kernels = [{"name": name, "cycles": n + skipped, "skipped_cycles": skipped} for name, n in by_name.items()]
    return {
        "case": {**vars(case), "tiles": [list(tile) for tile in case.tiles]},
        "device_kind": "TPU v5 lite",
        "kernels": kernels,
        "cycles": sum(k["cycles"] for k in kernels),
        "skipped_cycles": sum(k["skipped_cycles"] for k in kernels),
        "kernel_hbm_bytes": 10**9,
        "outside_hbm_bytes": 10**8,
        "temporary_bytes": 2**30 if case.implementation == "splash" else 2**29,
        "prepare_seconds": 1.5,
        "compile_seconds": 2.5,
    }


def cycles_of(case: Case) -> dict[str, int] | int:
    """Ours: half of splash's; dense: as splash's; splash is best with 1024 x 2048 forward, 2048 x 1024 backward."""
    sizes = dict(case.tiles)
    if case.implementation != "splash":
        return {"ours": 500, "dense": 1000}[case.implementation] * (3 if case.backward else 1)
    forward = 1000 if sizes["key"] == 2048 and sizes["query"] == 1024 else 1100
    if not case.backward:
        return {"splash_mha_fwd_no_residuals": forward}
    return {"splash_mha_fwd_residuals": forward, "splash_mha_dkv": 2000 if sizes["query_backward"] == 2048 else 2200}


def test_the_report_compares_with_the_best_of_the_peer(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(case: Case, say: Any, fresh: bool) -> dict[str, Any]:
        say("compiling")
        if dict(case.tiles).get("query") == 2048 and not case.backward:
            return {"error": "it needs too much memory"}
        return result(case, cycles_of(case))

    monkeypatch.setattr(kernels_command, "ask", ask)
    target = tmp_path / "counts.json"
    code, said, told = run("segmented_attention", "--chip", "v5e", "--json", str(target))
    assert code == 0, told
    report = json.loads(target.read_text())
    assert report["chip"] == "v5e"
    # Backward: 1000 of one candidate's forward and 2000 of the other's backward.
    assert report["ratio_to_peer"] == {
        "forward_4096": 0.5,
        "forward_16384": 0.5,
        "forward_131072": 0.5,
        "forward_backward_16384": 0.5,
    }
    assert report["ratio_to_peer_with_its_skipped_steps"]["forward_4096"] == 500 / 1010
    assert report["ratio_to_dense"]["forward_backward_16384"] == 0.5
    assert len(report["results"]) + len(report["refused"]) == len(kernels_attention.cases("v5e"))
    rows = {row["measured"]: row for row in report["rows"]}
    assert rows["forward_backward_131072"]["temporary_bytes"] == 2**29
    assert rows["forward_backward_131072"]["peer_temporary_bytes"] == 2**30
    assert rows["forward_4096"]["seconds"] == 4.0
    # 1.1 GB at 819 GB/s and 1.503 GHz
    assert rows["forward_4096"]["hbm_cycles"] == pytest.approx(1.1e9 / 819e9 * 1.503e9, rel=1e-3)
    for text in ("forward 16384", "0.500", "query 1024, key 2048", "not compiled: splash", "too much memory"):
        assert text in said
    assert "1/24" in told  # progress


def test_the_search_writes_the_best_tiles_and_leaves_other_chips(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(case: Case, say: Any, fresh: bool) -> dict[str, Any]:
        sizes = dict(case.tiles)
        if sizes["keys"] == 2048:
            return {"error": "it needs too much memory"}
        return result(case, 5000 - sizes["queries"] - sizes["part"] - sizes.get("span", 0) // 8)

    monkeypatch.setattr(kernels_command, "ask", ask)
    monkeypatch.setattr(kernels_command, "ROOT", tmp_path)
    table = tmp_path / kernels_attention.TABLE
    table.parent.mkdir(parents=True)
    shutil.copy(ROOT / kernels_attention.TABLE, table)
    before = runpy_table(table)
    code, said, told = run("segmented_attention", "--chip", "v5e", "--search", "--quiet")
    assert code == 0, told
    after = runpy_table(table)
    assert after.pop(("TPU v5 lite", "forward", 2)) == (2048, 512, 512, 0, False)
    assert after.pop(("TPU v5 lite", "backward", 2)) == (1024, 512, 512, 8192, False)
    assert after == {key: tiles for key, tiles in before.items() if key[0] != "TPU v5 lite"}
    assert "the best are in" in said
    assert told == ""


@pytest.mark.parametrize(("chip", "kind"), [("v5e", "TPU v5 lite"), ("v6e", "TPU v6 lite")])
def test_what_the_table_holds_is_among_what_is_tried(chip: str, kind: str) -> None:
    tried = [(case.backward, kernels_attention.tiles_of(case)) for case in kernels_attention.search(chip)]
    held = {kernel: Tiles(*sizes) for (of, kernel, _), sizes in TABLE.items() if of == kind}
    assert held.keys() == {"forward", "backward"}
    for kernel, tiles in held.items():
        assert (kernel == "backward", tiles) in tried


def runpy_table(path: pathlib.Path) -> dict[tuple[str, str, int], tuple[int, ...]]:
    scope: dict[str, Any] = {}
    exec(path.read_text(), scope)
    return scope["TABLE"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("attention", "--chip", "v5e"), "there is no kernel 'attention'; those .* are segmented_attention"),
        (("segmented_attention", "--chip", "h100"), "--chip is 'h100'; it is one of v4, v5e, v5p, v6e, tpu7x"),
        (("segmented_attention", "--chip", "v5e", "--json", "nowhere/x.json"), "there is no folder .*nowhere"),
        (("segmented_attention",), "--chip"),
    ],
)
def test_a_mistake_is_one_sentence(words: tuple[str, ...], sentence: str) -> None:
    code, said, told = run(*words)
    assert code == 2
    assert said == ""
    assert len(told.splitlines()) == 1
    assert re.search(sentence, told)


def test_what_the_compiler_refuses_of_ours_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_command, "ask", lambda case, say, fresh: {"error": "no such thing"})
    code, _, told = run("segmented_attention", "--chip", "v6e", "--quiet")
    assert code == 2
    assert told == "dsjax: ours, forward 4096, for v6e: no such thing\n"


def test_a_compiler_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_command, "COMMAND", DIES)
    with pytest.raises(UserError, match=r"died \(SIGABRT\) over ours, forward 4096; it said: a cry"):
        kernels_command.ask(Case("segmented_attention", "ours", "v5e", 4096))


def test_a_case_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def once(case: Case, text: str, say: Any) -> dict[str, Any]:
        asked.append(case)
        return result(case, 7)

    monkeypatch.setattr(kernels_command, "_run", once)
    case, other = (Case("segmented_attention", "ours", "v5e", length) for length in (4096, 16384))
    first = kernels_command.ask(case)
    assert kernels_command.ask(case) == json.loads(json.dumps(first))
    kernels_command.ask(other)
    kernels_command.ask(case, fresh=True)
    assert asked == [case, other, case]


def test_a_count_depends_on_our_kernels_only_where_it_is_of_one(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("dsjax", "pallas_kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(kernels_command, "ROOT", tmp_path)
    cases = [Case("segmented_attention", name, "v5e", 4096) for name in ("ours", "splash")]
    before = [kernels_command.fingerprint(case) for case in cases]
    (tmp_path / "pallas_kernels" / "segmented_attention" / "tiles.py").write_text("# another")
    ours, splash = (kernels_command.fingerprint(case) for case in cases)
    assert ours != before[0]
    assert splash == before[1]
    (tmp_path / "dsjax" / "plan" / "schedule.py").write_text("# another")
    assert kernels_command.fingerprint(cases[1]) != splash


# ---------------------------------------------------------------- what is reported


def test_the_floor_is_the_arithmetic_of_visible_blocks() -> None:
    """By hand: 288 blocks of 512 x 512 a head at 16,384; on v5e 2 x 512 cycles, on v6e, half empty, 2 x 256."""
    assert kernels_attention.mxu_floor("v5e", 1024, 512, 16384, False) == 8 * 288 * 1024
    assert kernels_attention.mxu_floor("v6e", 1024, 512, 16384, False) == 8 * 288 * 512
    assert kernels_attention.mxu_floor("v5e", 1024, 512, 16384, True) == 8 * 288 * 1024 * 3.5
    # Of one segment it is plain causal attention: 8 * 9 / 2 blocks.
    assert kernels_attention.mxu_floor("v5e", 4096, 0, 4096, False) == 8 * 36 * 1024


@pytest.mark.parametrize("length", [1024, 4096, 16384])
def test_the_floor_covers_the_visible_pairs(length: int) -> None:
    """Blocks hold all visible pairs, and beyond them only what the diagonal cuts off."""
    blocks = kernels_attention.mxu_floor("v5e", 1024, 512, length, False) / (8 * 1024)
    pairs = Segments(1024, 512).visible_pairs(length)
    assert blocks * 512**2 - pairs == length // 512 * (512 * 511 // 2)


@pytest.mark.parametrize(("chip", "gigahertz"), [("v4", 1.05), ("v5e", 1.5), ("v5p", 1.75), ("v6e", 1.75)])
def test_the_clock_that_follows_from_the_peak_is_the_known_one(chip: str, gigahertz: float) -> None:
    # Google's peaks are rounded to 3 digits.
    assert clock(CHIPS[chip]) == pytest.approx(gigahertz * 1e9, rel=5e-3)
    assert set(DELAY_SLOTS) == {name for name, of in CHIPS.items() if of.torus_dims}


# ---------------------------------------------------------------- splash attention


@pytest.mark.parametrize(("block_q", "block_k"), [(1024, 512), (512, 1024), (512, 512)])
def test_block_lists_are_those_that_splash_attention_prepares(block_q: int, block_k: int) -> None:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask

    causal = mask.MultiHeadMask([mask.CausalMask((4096, 4096))] * 2)
    backward = {"block_q_dkv": block_q, "block_kv_dkv": block_k, "block_kv_dkv_compute": block_k}
    sizes = splash.BlockSizes(block_q, block_k, block_k, use_fused_bwd_kernel=True, **backward)
    kernel = splash.make_splash_mha_single_device(causal, block_sizes=sizes)
    for info, name in ((kernel.fwd_mask_info, "forward"), (kernel.dkv_mask_info, "dkv")):
        fetch, runs = kernels_attention.causal_lists(4096, block_q, block_k, name)
        np.testing.assert_array_equal(info.data_next, fetch)
        np.testing.assert_array_equal(info.block_mask, runs)
        assert (info.data_next.dtype, info.block_mask.dtype) == (fetch.dtype, runs.dtype)


def test_splash_attention_runs_the_steps_that_its_mask_leaves() -> None:
    pytest.importorskip("libtpu")
    tiles = (("query", 1024), ("key", 1024), ("compute", 512))
    found = kernels_command.ask(Case("segmented_attention", "splash", "v5e", 4096, tiles=tiles))
    (kernel,) = found["kernels"]
    products = [region["executions"] for region in kernel["regions"] if region["slots"]["MXU"]]
    assert products == [8 * 10]  # heads times blocks on and below the diagonal of 4 x 4
    assert kernel["skipped_turns"] == 8 * 6
    # libtpu 0.0.52 was found to need 0.452M cycles; another version may schedule a little better or worse.
    assert found["cycles"] - found["skipped_cycles"] == pytest.approx(0.452e6, rel=0.1)
    # Queries and results once; of keys and values a block for each step that runs, unless it is there from the last.
    block = 1024 * 128 * 2
    assert 8 * (2 * 4 + 2 * 4) * block < found["kernel_hbm_bytes"] < 8 * (2 * 4 + 2 * 10) * block
    assert found["outside_hbm_bytes"] == 0
    assert found["temporary_bytes"] < 2**22  # ids of the queries, 128 lanes each
