"""Checkpoints: everything in one commit, on any mesh, hashed part by part; what goes wrong is said."""

from __future__ import annotations

import pathlib
import threading
from typing import Any

import jax
import numpy as np
import pytest
from small_runs import changed, saved_steps, small, small_moe

from dsjax import manifest
from dsjax.checkpoint import Checkpoints, combined_hash, flatten, state_hashes
from dsjax.config import UserError, apply_overrides
from dsjax.train.pretrain import build

HOST = {"data": {"rows_taken": 24, "fingerprint": "f"}, "loop": {"iteration": 3}}


def state_like(*, scale: float = 1.0) -> dict[str, Any]:
    return {"params": {"w": np.arange(6, dtype=np.float32).reshape(2, 3) * scale}, "step": np.int32(3)}


def on_device(state: Any) -> Any:
    return jax.tree.map(jax.numpy.asarray, state)


def shapes_of(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture
def checkpoints(tmp_path: pathlib.Path):
    opened = Checkpoints(tmp_path / "checkpoints", keep=2)
    yield opened
    opened.close()


# ---------------------------------------------------------------- saving


def test_what_is_saved_in_the_background_comes_back_whole(checkpoints: Checkpoints) -> None:
    state = on_device(state_like())
    checkpoints.save(3, state, HOST)
    checkpoints.wait()
    found, host, step = checkpoints.restore(shapes_of(state))
    assert (step, host) == (3, HOST)
    jax.tree.map(np.testing.assert_array_equal, found, state)


def test_a_state_may_be_given_away_as_soon_as_save_returns(checkpoints: Checkpoints) -> None:
    state = on_device(state_like())
    checkpoints.save(3, state, HOST)
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    checkpoints.wait()
    np.testing.assert_array_equal(checkpoints.load_numpy()[0]["params/w"], state_like()["params"]["w"])


def test_the_last_ones_are_kept(checkpoints: Checkpoints) -> None:
    for step in (1, 2, 3, 4):
        checkpoints.save(step, on_device(state_like()), HOST)
    checkpoints.wait()
    assert checkpoints.steps() == [3, 4]
    assert saved_steps(checkpoints.folder.parent) == [3, 4]
    assert checkpoints.latest() == 4


def test_state_and_host_state_are_one_commit(checkpoints: Checkpoints) -> None:
    checkpoints.save(3, on_device(state_like()), HOST)
    checkpoints.wait()
    assert {p.name for p in (checkpoints.folder / "3").iterdir()} == {"state", "host.json", "manifest.json"}


def test_a_commit_without_its_end_is_no_checkpoint(checkpoints: Checkpoints) -> None:
    checkpoints.save(3, on_device(state_like()), HOST)
    checkpoints.wait()
    (checkpoints.folder / ".saving-7").mkdir()  # as a killed save leaves it
    reopened = Checkpoints(checkpoints.folder, read_only=True)
    assert (reopened.latest(), reopened.steps()) == (3, [3])
    reopened.close()


def test_no_checkpoint_is_one_sentence(checkpoints: Checkpoints) -> None:
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoints.restore(shapes_of(on_device(state_like())))
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoints.load_numpy()


@pytest.mark.parametrize(
    ("saved", "asked", "sentence"),
    [
        ((2, 3), (2, 4), r"params/w is float32\[2,3\] there, float32\[2,4\] here"),
        ((2, 3), None, r"params/w is float32\[2,3\] there, missing here"),
        (None, (2, 3), r"params/w is missing there, float32\[2,3\] here"),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_array_and_both_shapes(
    saved: tuple[int, ...] | None, asked: tuple[int, ...] | None, sentence: str, checkpoints: Checkpoints
) -> None:
    def state(shape: tuple[int, ...] | None) -> Any:
        return on_device(
            {"params": {"a": np.zeros(1, np.float32)} | ({"w": np.zeros(shape, np.float32)} if shape else {})}
        )

    checkpoints.save(3, state(saved), HOST)
    checkpoints.wait()
    with pytest.raises(UserError, match=sentence):
        checkpoints.restore(shapes_of(state(asked)))


def test_another_type_of_number_does_not_fit(checkpoints: Checkpoints) -> None:
    checkpoints.save(3, on_device(state_like()), HOST)
    checkpoints.wait()
    other = shapes_of(on_device({"params": {"w": np.zeros((2, 3), np.int32)}, "step": np.int32(0)}))
    with pytest.raises(UserError, match=r"params/w is float32\[2,3\] there, int32\[2,3\] here"):
        checkpoints.restore(other)


# ---------------------------------------------------------------- meshes


def test_the_arrays_are_bit_equal_on_every_mesh_that_they_are_restored_to(tmp_path: pathlib.Path) -> None:
    meshes = [
        (8, "data=1,fsdp=2,expert=2,tensor=2"),
        (4, "data=1,fsdp=2,tensor=2"),
        (2, "data=1,expert=2"),
        (8, "data=1,expert=4,tensor=2"),
        (1, "data=1"),
    ]
    config = changed(small_moe(), optim={"name": "muon"})
    original: dict[str, np.ndarray] = {}
    hashes = set()
    for hop, (devices, mesh) in enumerate(meshes):
        _, trainer = build(apply_overrides(config, [f"mesh={mesh}"]), jax.devices()[:devices])
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        if hop == 0:
            state = trainer.init(np.uint32(0))
        else:
            state = checkpoints.restore(trainer.shapes)[0]
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path / f"checkpoints_{hop}")  # what follows reads what this mesh wrote
        checkpoints.save(hop, state, HOST)
        checkpoints.close()
        if hop:
            (tmp_path / "checkpoints").rename(tmp_path / f"old_{hop}")
            (tmp_path / f"checkpoints_{hop}").rename(tmp_path / "checkpoints")
        arrays = {name: np.asarray(x) for name, x in flatten(state).items()}
        original = original or arrays
        assert arrays.keys() == original.keys()
        assert all(arrays[n].tobytes() == original[n].tobytes() for n in original)
        split = [x for x in jax.tree.leaves(state) if not x.sharding.is_fully_replicated]
        assert bool(split) == (devices > 1)  # else nothing was moved
        reopened = Checkpoints(tmp_path / "checkpoints", read_only=True)
        loaded, host, _ = reopened.load_numpy()
        hashes.add(combined_hash(state_hashes(loaded, host)))
        reopened.close()
    assert len(hashes) == 1


# ---------------------------------------------------------------- hashes


ARRAYS = {
    "params/w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "opt_state/mu": np.ones(2, np.float32),
    "rng": np.array([1, 2], np.uint32),
    "step": np.array(3, np.int32),
    "buffers/bias": np.zeros(2, np.float32),
}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("params/w", "parameters"),
        ("opt_state/mu", "optimizer"),
        ("rng", "rng"),
        ("step", "step"),
        ("buffers/bias", "buffers"),
    ],
)
def test_the_hash_of_a_part_changes_with_its_arrays_and_no_other(name: str, part: str) -> None:
    before = state_hashes(ARRAYS, HOST)
    other = ARRAYS[name].copy()
    other.reshape(-1).view(np.uint8)[0] ^= 1  # one bit
    after = state_hashes(ARRAYS | {name: other}, HOST)
    assert {p for p in before if before[p] != after[p]} == {part}
    assert combined_hash(before) != combined_hash(after)


@pytest.mark.parametrize("part", ["data", "loop"])
def test_the_hash_of_plain_data_changes_with_it_and_no_other(part: str) -> None:
    before, after = state_hashes(ARRAYS, HOST), state_hashes(ARRAYS, HOST | {part: HOST[part] | {"x": 1}})
    assert {p for p in before if before[p] != after[p]} == {part}


@pytest.mark.parametrize(
    "other",
    [
        {"params/w": ARRAYS["params/w"].reshape(3, 2)},
        {"params/w": ARRAYS["params/w"].view(np.int32)},
        {"params/v": ARRAYS["params/w"], "params/w": np.zeros(0, np.float32)},
    ],
    ids=["shape", "type", "name"],
)
def test_the_hash_covers_names_shapes_and_types(other: dict[str, np.ndarray]) -> None:
    assert state_hashes(ARRAYS | other, HOST)["parameters"] != state_hashes(ARRAYS, HOST)["parameters"]


def test_the_hash_depends_on_no_order() -> None:
    reordered = dict(reversed(ARRAYS.items()))
    host = {"loop": HOST["loop"], "data": dict(reversed(HOST["data"].items()))}
    assert state_hashes(reordered, host) == state_hashes(ARRAYS, HOST)


# ---------------------------------------------------------------- errors


def full(*args: Any, **options: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["save", "wait", "check", "close"])
def test_an_error_of_a_background_save_surfaces_at_the_next_call(
    call: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state = on_device(state_like())
    checkpoints.save(1, state, HOST)
    checkpoints.wait()
    with monkeypatch.context() as broken:
        broken.setattr(manifest, "write", full)
        checkpoints.save(2, state, HOST)
        checkpoints._saving[1]._thread.join()
    arguments = (3, state, HOST) if call == "save" else ()
    with pytest.raises(UserError, match=r"checkpoint 2 in .* could not be saved: No space left on device"):
        getattr(checkpoints, call)(*arguments)
    assert checkpoints.latest() == 1
    assert not [p for p in checkpoints.folder.iterdir() if p.name.startswith(".saving")]
    if call != "close":
        checkpoints.save(4, state, HOST)  # space was made
        checkpoints.close()
        assert saved_steps(tmp_path) == [1, 4]


def test_check_does_not_wait(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    monkeypatch.setattr(manifest, "write", lambda *args: held.wait(60))
    checkpoints.save(1, on_device(state_like()), HOST)
    checkpoints.check()
    assert checkpoints.steps() == []
    held.set()


def test_a_folder_that_can_not_be_made_is_one_sentence(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"checkpoints in .* could not be opened: Not a directory"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_small_configs_are_small() -> None:
    assert small().model.num_params() < 10_000
    assert small_moe().model.num_params() < 10_000


def test_two_processes_do_not_train_one_run(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsjax.checkpoint.LOCK_SECONDS", 0.2)
    with pytest.raises(UserError, match="another process trains the run in"):
        Checkpoints(checkpoints.folder)
    Checkpoints(checkpoints.folder, read_only=True).close()  # but it may be looked at
    checkpoints.close()
    Checkpoints(checkpoints.folder).close()
