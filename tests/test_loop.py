"""The loop: what was interrupted goes on as if nothing had been; bad numbers never reach the state."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import signal
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import (
    Child,
    changed,
    home,
    saved,
    saved_steps,
    small,
    state_hash,
    training_records,
    write_corpus,
)

from dsjax import manifest
from dsjax.config import UserError
from dsjax.data.batch import Batch
from dsjax.data.tokenizer import train_tokenizer
from dsjax.evals.report import evaluate_run
from dsjax.nn.masks import Documents
from dsjax.train import pretrain
from dsjax.train.loop import Job, restore_or_init
from dsjax.train.step import TrainState


@pytest.fixture(scope="module", autouse=True)
def _compiled_once() -> Iterator[None]:
    """The many runs of this file share a few programs."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(home() / "cache" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def run(folder: pathlib.Path, **parts: dict[str, Any]) -> int:
    return pretrain.run(changed(small(), **parts), folder, quiet=True)


def params(folder: pathlib.Path, step: int | None = None) -> bytes:
    arrays = saved(folder, step)[0]
    return b"".join(arrays[name].tobytes() for name in sorted(arrays) if name.startswith("params/"))


def loop_state(folder: pathlib.Path, step: int | None = None) -> dict[str, Any]:
    return saved(folder, step)[1]["loop"]


# ---------------------------------------------------------------- resuming


@pytest.fixture(scope="module")
def control() -> pathlib.Path:
    """20 steps without interruption."""
    folder = home() / "control"
    assert run(folder, train={"steps": 20}, checkpoint={"every": 10}) == 0
    return folder


def test_ten_steps_and_ten_more_are_twenty(control: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(control, folder)
    shutil.rmtree(folder / "checkpoints" / "20")  # as if killed while the last checkpoint was written
    assert run(folder, train={"steps": 20}, checkpoint={"every": 10}) == 0
    assert state_hash(folder) == state_hash(control)
    losses = [{r["step"]: r["loss"] for r in training_records(f) if r["step"] % 4 == 0} for f in (folder, control)]
    assert losses[0] == losses[1]


def test_every_step_is_recorded_once(tmp_path: pathlib.Path) -> None:
    for _ in range(2):
        assert run(tmp_path / "run", train={"steps": 9, "log_every": 1}) == 0
        assert [r["step"] for r in training_records(tmp_path / "run")] == list(range(1, 10))
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "9")
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")


def test_more_steps_go_on_from_the_end(control: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(control, folder)
    assert run(folder, train={"steps": 24}, checkpoint={"every": 10}) == 0
    assert loop_state(folder)["iteration"] == 24
    assert saved_steps(folder)[-2:] == [20, 24]
    assert json.loads((folder / "config.json").read_text())["train"]["steps"] == 24


def test_a_finished_run_stays_as_it_is(control: pathlib.Path) -> None:
    before = state_hash(control), (control / "metrics.jsonl").read_bytes()
    assert run(control, train={"steps": 20}, checkpoint={"every": 10}) == 0
    assert (state_hash(control), (control / "metrics.jsonl").read_bytes()) == before


def test_other_data_is_refused_and_changes_nothing(tmp_path: pathlib.Path) -> None:
    folder, corpus, tokenizer = tmp_path / "run", tmp_path / "corpus", tmp_path / "tokenizer.json"
    write_corpus(corpus, seed=5)
    tokenizer.write_text(train_tokenizer([(corpus / "0.txt").read_text()], 300).to_json())
    config = changed(small(str(corpus)), data={"tokenizer_path": str(tokenizer)})
    assert pretrain.run(config, folder, quiet=True) == 0
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    (corpus / "3.txt").write_text("something else entirely")
    with pytest.raises(UserError, match="the training data changed"):
        pretrain.run(changed(config, train={"steps": 12}), folder, quiet=True)
    with pytest.raises(UserError, match=r"changed since it was trained: changed in data\.sources\.0: 3\.txt"):
        evaluate_run(folder, quiet=True)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_the_largest_seed_is_one(tmp_path: pathlib.Path) -> None:
    assert run(tmp_path / "run", train={"steps": 1, "seed": 2**32 - 1}) == 0


# ---------------------------------------------------------------- interruption


LONG = ("train.steps=400", "train.log_every=1", "checkpoint.every=100000")


@pytest.fixture(scope="module")
def uninterrupted() -> pathlib.Path:
    """The control of the interrupted runs, on one core as they are."""
    folder = home() / "uninterrupted"
    assert Child("train", str(home() / "small.py"), *LONG, "--run", str(folder)).end()[0] == 0
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_ends_as_if_it_had_not_been(
    number: signal.Signals, uninterrupted: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    words = ("train", str(home() / "small.py"), *LONG, "--run", str(tmp_path / "run"))
    code, _, said = Child(*words).wait_for("training 11/").send(number).end()
    assert code == 130, said
    stopped = saved_steps(tmp_path / "run")
    assert f"{number.name}: saved at step {stopped[0]}; the same command goes on from there" in said
    assert 11 <= stopped[0] < 400
    code, _, said = Child(*words).end()
    assert code == 0, said
    assert f"resumed at step {stopped[0]} of 400" in said
    assert state_hash(tmp_path / "run") == state_hash(uninterrupted)
    assert [r["step"] for r in training_records(tmp_path / "run")] == list(range(1, 401))


SLOW_END = "import time, dsjax.train.loop as loop\nloop.plot_loss = lambda *a, **k: time.sleep(300)"


def test_a_second_ctrl_c_stops_at_once(tmp_path: pathlib.Path) -> None:
    words = ("train", str(home() / "small.py"), *LONG, "--run", str(tmp_path / "run"))
    child = Child(*words, code=SLOW_END).wait_for("training 1/").send(signal.SIGINT)
    child.wait_for("Ctrl-C stops at once").send(signal.SIGINT)
    assert child.seconds_to_end() < 5
    assert child.process.returncode == -signal.SIGINT


def test_ctrl_c_before_the_first_step_is_one_line(tmp_path: pathlib.Path) -> None:
    words = (
        "train",
        str(home() / "small.py"),
        "compute.unroll=true",
        "model.num_layers=20",
        "--run",
        str(tmp_path / "run"),
    )
    fresh = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")}  # so that there is something to compile
    code, _, said = Child(*words, env=fresh).wait_for("documents held out").send(signal.SIGINT).end(timeout=30)
    assert code == 130
    assert said.splitlines()[-1] == "dsjax: interrupted"
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- bad numbers


def random_batch(seed: int = 0, *, rows: int = 8, length: int = 16) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 50, (rows, length + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    weight = (rng.random((rows, length)) < rng.random((rows, 1))).astype(np.float32)  # rows of uneven weight
    return Batch(tokens[:, :-1], tokens[:, 1:], weight, Documents(np.ones((rows, length), np.int32), positions))


def spoilt(batch: Batch) -> Batch:
    return dataclasses.replace(batch, loss_weight_BT=batch.loss_weight_BT * np.float32(np.nan))


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Gives NaN weights to the batches of these iterations (from 1)."""
    place = pretrain.place_batch

    def choose(bad: Any, first: int = 1) -> None:
        taken = iter(range(first, 10**9))
        monkeypatch.setattr(
            pretrain, "place_batch", lambda batch, *where: place(spoilt(batch) if next(taken) in bad else batch, *where)
        )

    return choose


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_step_leaves_every_bit_of_the_state(accumulate: int) -> None:
    mesh, trainer = pretrain.build(
        changed(small(), train={"accumulate": accumulate}, mesh={"data": 1}), jax.devices()[:1]
    )
    batches = [pretrain.place_batch(b, mesh) for b in (random_batch(), spoilt(random_batch(1)), random_batch(1))]
    state, _ = trainer.step(trainer.init(np.uint32(0)), batches[0], jnp.int32(9))
    before = jax.tree.map(np.array, state)
    state, metrics = trainer.step(state, batches[1], jnp.int32(9))
    assert not float(metrics["finite"])
    same = jax.tree.map(lambda a, b: a.tobytes() == np.asarray(b).tobytes(), before, state)
    assert jax.tree.all(same)
    state, metrics = trainer.step(state, batches[2], jnp.int32(9))  # the control: a good one changes every part
    assert float(metrics["finite"])
    assert not any(
        jax.tree.all(
            jax.tree.map(lambda a, b: a.tobytes() == np.asarray(b).tobytes(), getattr(before, f), getattr(state, f))
        )
        for f in ("step", "params", "opt_state", "rng")
    )


def test_single_bad_steps_are_skipped_and_counted(tmp_path: pathlib.Path, spoil: Callable[..., None]) -> None:
    spoil({2, 5, 6})
    assert run(tmp_path / "run", train={"log_every": 1}) == 0
    found = loop_state(tmp_path / "run")
    assert (found["iteration"], found["skipped"], found["rollbacks"], found["bad_in_a_row"]) == (8, 3, 0, 0)
    assert int(saved(tmp_path / "run")[0]["step"]) == 5  # updates
    records = training_records(tmp_path / "run")
    assert [r["loss"] is None for r in records] == [False, True, False, False, True, True, False, False]
    assert [r["skipped"] for r in records] == [0, 1, 1, 1, 2, 3, 3, 3]
    assert found["tokens_seen"] == records[-1]["tokens_seen"] == 5 * 8 * 16


def test_three_bad_steps_in_a_row_go_back_to_the_checkpoint(tmp_path: pathlib.Path, spoil: Callable[..., None]) -> None:
    spoil({6, 7, 8})
    assert run(tmp_path / "run", train={"steps": 12}) == 0
    assert saved_steps(tmp_path / "run") == [4, 8, 12]
    assert params(tmp_path / "run", 8) == params(tmp_path / "run", 4)  # step 5 is taken back
    assert [int(saved(tmp_path / "run", s)[0]["step"]) for s in (4, 8, 12)] == [4, 4, 8]
    found = loop_state(tmp_path / "run")
    assert (found["skipped"], found["rollbacks"]) == (3, 1)


def test_without_a_checkpoint_they_go_back_to_the_beginning(tmp_path: pathlib.Path, spoil: Callable[..., None]) -> None:
    spoil({2, 3, 4})
    assert run(tmp_path / "run", train={"steps": 4}) == 0
    _, trainer = pretrain.build(small())
    first = trainer.init(np.uint32(0))
    arrays = saved(tmp_path / "run")[0]
    assert int(arrays["step"]) == 0
    assert arrays["params/embedding"].tobytes() == np.asarray(first.params["embedding"]).tobytes()
    assert loop_state(tmp_path / "run")["rollbacks"] == 1


def test_where_a_roll_back_leads_does_not_depend_on_when_numbers_are_looked_at(
    tmp_path: pathlib.Path, spoil: Callable[..., None]
) -> None:
    hashes = []
    for log_every in (1, 100):
        spoil({5, 6, 7})
        folder = tmp_path / str(log_every)
        assert run(folder, train={"steps": 10, "log_every": log_every}, checkpoint={"every": 4}) == 0
        hashes.append(state_hash(folder))
    assert hashes[0] == hashes[1]


def test_a_run_that_stays_bad_stops_with_a_report(tmp_path: pathlib.Path, spoil: Callable[..., None]) -> None:
    folder = tmp_path / "run"
    spoil(range(6, 10**6))
    assert run(folder, train={"steps": 30}) == 1
    report = json.loads((folder / "failure.json").read_text())
    # bad: 6 7 8, 9 10 11, 12 13 14, 15 16 17
    assert (report["rollbacks"], report["skipped"]) == (3, 12)
    assert report["last_losses"][-1] == "nan"
    assert saved_steps(folder) == [4, 8, 12, 16]
    assert {params(folder, step) for step in (8, 12, 16)} == {params(folder, 4)}
    spoil(())  # the data is mended
    assert run(folder, train={"steps": 30}) == 0
    assert not (folder / "failure.json").exists()
    assert loop_state(folder)["iteration"] == 30


def test_a_save_that_fails_stops_the_run_within_a_step(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    assert run(tmp_path / "run", train={"steps": 4}) == 0
    monkeypatch.setattr(manifest, "write", full)
    with pytest.raises(UserError, match=r"checkpoint \d+ in .* could not be saved: No space left on device"):
        run(tmp_path / "run", train={"steps": 1000})
    assert saved_steps(tmp_path / "run") == [4]


# ---------------------------------------------------------------- batches, time


def test_micro_batches_give_the_loss_and_the_update_of_the_whole_batch() -> None:
    found = []
    for accumulate in (1, 4):
        config = changed(small(), train={"accumulate": accumulate}, mesh={"data": 1})
        mesh, trainer = pretrain.build(config, jax.devices()[:1])
        state, losses = trainer.init(np.uint32(0)), []
        for seed in range(3):
            batch = pretrain.place_batch(random_batch(seed), mesh)
            assert len(set(np.asarray(batch.loss_weight_BT).sum(axis=1))) > 4  # uneven
            state, metrics = trainer.step(state, batch, jnp.int32(9))
            losses.append(float(metrics["loss"]))
        found.append((losses, jax.tree.map(np.asarray, state.params)))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)  # float32 sums in another order
    # atol: Adam divides by the gradient's size, so where that is near 0 its sign is rounding.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found[0][1], found[1][1])


def test_a_limit_of_time_plans_fewer_steps_and_ends_with_a_small_learning_rate(tmp_path: pathlib.Path) -> None:
    asked = 1_000_000
    parts = {"train": {"steps": asked, "max_minutes": 0.2, "log_every": 10}, "checkpoint": {"every": 10**6}}
    assert run(tmp_path / "run", **parts) == 0
    records = training_records(tmp_path / "run")
    found = loop_state(tmp_path / "run")
    assert found["iteration"] == found["total_steps"] == records[-1]["step"] < asked
    assert records[-1]["lr"] < 0.05 * max(r["lr"] for r in records)


def test_a_limit_of_time_is_one_while_the_rate_still_rises(tmp_path: pathlib.Path) -> None:
    assert run(tmp_path / "run", train={"steps": 1000, "max_minutes": 1e-4}, optim={"warmup_steps": 900}) == 0
    assert loop_state(tmp_path / "run")["iteration"] < 10


def test_more_time_is_taken(tmp_path: pathlib.Path) -> None:
    short = {"steps": 40, "max_minutes": 1e-4, "log_every": 1}
    optim = {"warmup_steps": 30}
    for _ in range(2):
        assert run(tmp_path / "run", train=short, optim=optim) == 0
        assert loop_state(tmp_path / "run")["iteration"] < 10
    assert run(tmp_path / "run", train=short | {"max_minutes": 0.0}, optim=optim) == 0
    assert loop_state(tmp_path / "run")["iteration"] == 40
    assert loop_state(tmp_path / "run")["asked_minutes"] == 0


@pytest.mark.parametrize(
    ("before", "now", "planned"),
    [(2.0, 2.0, 9), (2.0, 1.0, 9), (2.0, 3.0, 90), (2.0, 0.0, 90), (0.0, 0.0, 9), (0.0, 3.0, 9), (None, 3.0, 9)],
)
def test_steps_are_planned_anew_when_more_time_is_asked_for(before: float | None, now: float, planned: int) -> None:
    loop = {"iteration": 5, "total_steps": 9, "asked_steps": 90} | ({} if before is None else {"asked_minutes": before})
    state = TrainState(np.int32(5), {}, {}, {}, np.zeros(2, np.uint32))
    parts = {name: mock.MagicMock() for name in ("checkpoints", "batches", "trainer")}
    job = mock.MagicMock(spec=Job, frozen=dict, **parts)
    job.checkpoints.empty.return_value = False
    job.checkpoints.restore.return_value = (state, {"data": None, "loop": loop}, 5)
    counters = restore_or_init(changed(small(), train={"steps": 90, "max_minutes": now}), job)[1]
    assert (counters.total_steps, counters.asked_steps, counters.asked_minutes) == (planned, 90, now)


def test_no_step_compiles_anything_after_the_second(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, at_step = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **options: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    place = pretrain.place_batch

    def counted(batch: Batch, *where: Any) -> Batch:
        at_step.append(len(compiled))
        return place(batch, *where)

    monkeypatch.setattr(pretrain, "place_batch", counted)
    try:
        assert run(tmp_path / "run", train={"steps": 12, "log_every": 3, "seed": 77}, optim={"b1": 0.91}) == 0
    finally:
        jax.monitoring.clear_event_listeners()
    assert at_step[0] > 0  # the listener hears something
    # Behind step 1 the first record and behind step 3 the matmul peak; then logs, saves and steps, all seen before.
    assert len(at_step) == 12
    assert len(set(at_step[4:])) == 1
