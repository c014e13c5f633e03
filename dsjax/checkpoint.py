"""Checkpoints: Orbax, asynchronous, the whole state of a run in one commit that can be verified.

    checkpoints/
      30/                 a committed step
        state/            the arrays of :class:`~dsjax.train.step.TrainState`, by Orbax
        host.json         plain data: data iterator, counters
        manifest.json     every file's size and SHA-256, the arrays' shapes and types; written last, see dsjax.manifest
      .saving-40/         being written; one rename makes it 40
      damaged-20/         did not verify: set aside, never deleted

The latest step is the highest one whose manifest verifies. Arrays are restored onto whatever mesh the resumed run has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Annotated, Any

import jax
import numpy as np

from dsjax import hosts, manifest
from dsjax.background import InBackground
from dsjax.config import Bounds, PositiveInt, UserError
from dsjax.manifest import Damaged

HostState = dict[str, Any]

SAVE_SECONDS = 1800  # a save that takes longer has failed
SHARED_SECONDS = 10  # for a new file to be seen by all hosts
LOCK_SECONDS = 5  # for a process that ends

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """``every``: steps between saves; ``keep``: how many of the last are kept, each of them verified."""

    every: PositiveInt = 200
    keep: Annotated[int, Bounds(ge=2)] = 2


class Checkpoints:
    """The checkpoints of one run folder. An error of a background save surfaces at the next call.

    Args:
        folder: made if missing.
        keep: how many steps are kept.
        about: what every manifest also says: mesh, config, data.
        read_only: only look; nothing is made, renamed or removed.
    """

    def __init__(
        self, folder: pathlib.Path, *, keep: int = 2, about: dict[str, Any] | None = None, read_only: bool = False
    ):
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs the traces of what it raises
        quieten_late_callbacks()
        self._ocp = ocp
        self._orbax = ocp.AsyncCheckpointer(
            ocp.StandardCheckpointHandler(), async_options=ocp.options.AsyncOptions(timeout_secs=SAVE_SECONDS)
        )
        self.folder = folder.resolve()
        self._keep, self._about, self._read_only = keep, about or {}, read_only
        self._saving: tuple[int, InBackground] | None = None
        self._lock: int | None = None
        self.newest: int | None = None  # the step that this process saved or restored last
        if not read_only:
            with self._told_as("checkpoints", "opened"):
                self._open()

    def _open(self) -> None:
        """Makes the folder, and clears away what a killed process left half-written or half-deleted."""
        if not hosts.index():
            manifest.make_folder(self.folder)
            self._lock = locked(self.folder)
            for left in (*self.folder.glob(".saving-*"), *self.folder.glob(".deleting-*")):
                shutil.rmtree(left)
        if hosts.count() > 1:
            self._check_shared()

    def _check_shared(self) -> None:
        """All processes must write into one folder, not into folders of the same name on disks of their own."""
        token, proof = hosts.exchange("folder token", secrets.token_hex(8))[0], self.folder / ".shared"
        if not hosts.index():
            proof.write_text(token)
        hosts.exchange("folder written", None)
        deadline = time.monotonic() + SHARED_SECONDS
        while not (seen := proof.is_file() and proof.read_text() == token) and time.monotonic() < deadline:
            time.sleep(0.2)
        for process, sees in enumerate(hosts.exchange("folder seen", seen)):
            if not sees:
                raise UserError(
                    f"{hosts.name(process)} does not see what {hosts.name(0)} writes into {self.folder}:"
                    " --run must be a folder on a file system that all hosts share"
                )

    # ---------------------------------------------------------------- which there are

    def steps(self) -> list[int]:
        """All committed steps; not yet verified."""
        return committed(self.folder)

    def set_aside(self) -> list[str]:
        """The folders of steps that did not verify."""
        return sorted(p.name for p in self.folder.glob("damaged-*")) if self.folder.is_dir() else []

    def empty(self) -> bool:
        """Whether nothing was ever committed here."""
        return hosts.exchange("empty", not self.steps() and not self.set_aside())[0]

    def latest(self) -> int | None:
        """The step that a resume takes: the highest that verifies. Those above it are set aside."""
        found = self._highest()
        return found and found[0]

    def _highest(self) -> tuple[int, dict[str, Any]] | None:
        """The highest step that verifies, and the body of its manifest."""
        self.wait()
        for step in hosts.exchange("steps", self.steps()[::-1])[0]:
            body = self._verified(step)
            if body is not None:
                return step, body
        return None

    def _verified(self, step: int) -> dict[str, Any] | None:
        """The manifest's body if every byte of a step is as it was saved; else it is set aside. Hosts share this."""
        body, damage = {}, ""
        try:
            body = self._read(step)
            manifest.verify(self._at(step), body, part=hosts.index(), parts=hosts.count())
        except Damaged as error:
            damage = str(error)
        damages = [found for found in hosts.exchange("damage", damage) if found]
        if not damages:
            return body
        where = f"checkpoint {step} in {self.folder} is damaged: {damages[0]}"
        if self._read_only:
            _log.warning("%s; the one before it is looked at", where)
        elif not hosts.index():
            _log.warning("%s; it is set aside as %s", where, self._move_aside(step))
        hosts.exchange("set aside", None)
        return None

    def _read(self, step: int) -> dict[str, Any]:
        """The body of a step's manifest.

        Raises:
            Damaged: it is none, or of another step.
        """
        body = manifest.read(self._at(step))
        if body.get("step") != step:
            raise Damaged(f"{manifest.FILE} is that of step {body.get('step')!r}")
        if not _describes_arrays(body.get("arrays")):
            raise Damaged(f"{manifest.FILE} states no shapes and types of arrays")
        return body

    def _move_aside(self, step: int) -> str:
        names = (f"damaged-{step}" + (f"-{again}" if again else "") for again in range(10**6))
        name = next(name for name in names if not (self.folder / name).exists())
        with self._told_as(f"checkpoint {step}", "set aside"):
            return self._at(step).rename(self.folder / name).name

    def _at(self, step: int) -> pathlib.Path:
        return self.folder / str(step)

    # ---------------------------------------------------------------- saving

    def save(self, step: int, state: Any, host: HostState) -> None:
        """Starts to save; returns once the arrays are copied, the rest goes on in the background.

        Raises:
            UserError: this save, or the one before, can not be written.
        """
        self.wait()
        tree = as_tree(state)
        arrays = {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in flatten(tree).items()}
        staging = self.folder / f".saving-{step}"
        with self._told_as(f"checkpoint {step}", "saved"):
            if not hosts.index():
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir()
                (staging / "host.json").write_text(json.dumps(host, allow_nan=False), encoding="utf-8")
            self._orbax.save(staging / "state", args=self._ocp.args.StandardSave(tree))
        self._saving = step, InBackground(lambda: self._commit(step, staging, arrays))
        self.newest = step

    def _commit(self, step: int, staging: pathlib.Path, arrays: dict[str, Any]) -> None:
        """Waits for the arrays, writes the manifest, renames; then old steps go. Each host hashes some of the files."""
        self._orbax.wait_until_finished()
        names = hosts.exchange("saved files", manifest.files_of(staging))[0]
        parts = hosts.exchange("hashes", manifest.inventory(staging, names[hosts.index() :: hosts.count()]))
        if not hosts.index():
            files = {name: entry for part in parts for name, entry in part.items()}
            manifest.write(staging, self._about | {"format": 1, "step": step, "arrays": arrays}, files)
            if self._at(step).exists():
                self._move_aside(step)
            staging.rename(self._at(step))
            manifest.sync_folder(self.folder)
        hosts.exchange("committed", step)
        self._prune(step)

    def _prune(self, newest: int) -> None:
        """Deletes what lies behind the last ``keep`` steps, once those are known to be good."""
        kept = 1
        for step in hosts.exchange("kept", [s for s in self.steps() if s < newest][::-1])[0]:
            if kept < self._keep:
                kept += self._verified(step) is not None
            elif not hosts.index():
                going = self.folder / f".deleting-{step}"  # half of a step is none
                self._at(step).rename(going)
                shutil.rmtree(going)

    def check(self) -> None:
        """Raises, without waiting, what went wrong with a save that has ended; cheap enough for every step."""
        if self._saving is not None and self._saving[1].done():
            self.wait()

    def wait(self) -> None:
        """Until the save under way is committed.

        Raises:
            UserError: it can not be written.
        """
        if self._saving is None:
            return
        (step, commit), self._saving = self._saving, None
        with self._told_as(f"checkpoint {step}", "saved"):
            try:
                commit.result(SAVE_SECONDS)
            except Exception:
                if not hosts.index():  # a full disk has no room for half of a step
                    shutil.rmtree(self.folder / f".saving-{step}", ignore_errors=True)
                raise

    def close(self) -> None:
        """Ends the background threads, once the save under way is committed or has failed."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # told by wait
                self._orbax.close()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    @contextlib.contextmanager
    def _told_as(self, what: str, done: str) -> Iterator[None]:
        """Whatever is raised as one sentence."""
        try:
            yield
        except (UserError, hosts.HostLost):
            raise
        except Exception as error:
            raise UserError(
                f"{what} in {self.folder} could not be {done}: {reason(error)}; earlier checkpoints stay as they are"
            ) from error

    # ---------------------------------------------------------------- restoring

    def restore(self, shapes: Any, step: int | None = None) -> tuple[Any, HostState, int]:
        """State, host state and step of the latest checkpoint (or of ``step``), every byte verified.

        Args:
            shapes: abstract state whose shardings say where each array goes.
            step: which one.

        Raises:
            UserError: there is none, or its arrays are not those of ``shapes``.
        """
        step, body = self._body(step)
        made, here = body.get("config", {}), self._about.get("config", {})
        for key in sorted(made.keys() & here.keys()):
            if made[key] != here[key]:
                values = f"{key} is {made[key]} there, {here[key]} here"
                raise UserError(f"checkpoint {step} in {self.folder} is of another run: {values}")
        asked = flatten(as_tree(shapes))
        for name in sorted(set(body["arrays"]) | set(asked)):
            there, here = _kind(body["arrays"].get(name)), _kind(asked.get(name))
            if there != here:
                raise UserError(
                    f"checkpoint {step} in {self.folder} does not fit the config: {name} is {there} there, {here} here"
                )
        by_name, host = self._arrays(step, as_tree(shapes))
        leaves = [by_name[path_name(path)] for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
        self.newest = step
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves), host, step

    def restore_part(self, arrays: dict[str, Any], step: int | None = None, *, again: bool = False) -> dict[str, Any]:
        """Some arrays of the latest checkpoint (or of ``step``), verified, each cast to the type asked for.

        ``arrays``: by name, abstract; shardings say where each goes. ``again``: ``step`` is known to verify.

        Raises:
            UserError: there is no checkpoint, or an array is missing or has another shape.
        """
        step, body = self._body(step) if step is None or not again else (step, self._read(step))
        for name, array in arrays.items():
            there = body["arrays"].get(name)
            if there is None or tuple(there["shape"]) != array.shape:
                kinds = f"{name} is {_kind(there)} there, {_kind(array)} here"
                raise UserError(f"checkpoint {step} in {self.folder} is of another model: {kinds}")
        ocp, tree = self._ocp, _nested({tuple(name.split("/")): x for name, x in arrays.items()})
        how = ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True)
        with self._told_as(f"checkpoint {step}", "read"), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as part:
            return flatten(part.restore(self._at(step) / "state", args=how))

    def load_numpy(self, step: int | None = None) -> tuple[dict[str, np.ndarray], HostState, int]:
        """All arrays by name as numpy, whatever devices they were saved from, every byte verified.

        Raises:
            UserError: there is no checkpoint.
        """
        step, body = self._body(step)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        with self._told_as(f"checkpoint {step}", "read"):
            shapes = {
                name: jax.ShapeDtypeStruct(tuple(kind["shape"]), kind["dtype"], sharding=device)
                for name, kind in body["arrays"].items()
            }
            arrays, host = self._arrays(step, _nested({tuple(name.split("/")): x for name, x in shapes.items()}))
        return {name: np.asarray(x) for name, x in arrays.items()}, host, step

    def about(self, step: int) -> dict[str, Any]:
        """What the manifest of a step says of the run: its config, data and mesh."""
        return self._read(step)

    def _body(self, step: int | None) -> tuple[int, dict[str, Any]]:
        """The step to take, and its verified manifest."""
        found = self._highest() if step is None else self._given(step)
        if found is None:
            raise UserError(self._nothing_left())
        return found

    def _given(self, step: int) -> tuple[int, dict[str, Any]] | None:
        if step not in self.steps():
            raise UserError(f"no checkpoint {step} in {self.folder}; there are {self.steps()}")
        body = self._verified(step)
        return None if body is None else (step, body)

    def _nothing_left(self) -> str:
        if not self.steps() and not self.set_aside():
            return f"no checkpoint in {self.folder}"
        damaged = ", ".join([*self.set_aside(), *map(str, self.steps())])
        return f"no checkpoint in {self.folder} verifies (damaged: {damaged}); to begin anew, give another --run"

    def _arrays(self, step: int, tree: Any) -> tuple[dict[str, Any], HostState]:
        with self._told_as(f"checkpoint {step}", "read"):
            restored = self._orbax.restore(self._at(step) / "state", args=self._ocp.args.StandardRestore(tree))
            return flatten(restored), json.loads((self._at(step) / "host.json").read_text(encoding="utf-8"))


def committed(folder: pathlib.Path) -> list[int]:
    """The steps in a folder, sorted: the numbers that name something there as they are written, not as ``0005``."""
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def locked(folder: pathlib.Path) -> int:
    """A lock on a folder against other processes of this machine: a file handle, which ends with the process.

    It lies on a disk of the machine. A lock on a shared file system may outlive a host that was switched off.

    Raises:
        UserError: another process has it, and keeps it.
    """
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    path = pathlib.Path(tempfile.gettempdir(), f"dsjax-{os.getuid()}-{name}.lock")
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(lock)
                raise UserError(
                    f"another process trains the run in {folder.parent}; stop it, or give another --run"
                ) from None
            time.sleep(0.1)


def reason(error: Exception) -> str:
    """What went wrong, in the words of the operating system if it was that."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    known = (os.strerror(number) for number in errno.errorcode)
    return next((words for words in known if words in text), text[:300])


def quieten_late_callbacks() -> None:
    """When a write fails, TensorStore's other writes end later, and would each print a trace of a closed event loop."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    if not hasattr(before, "quiet"):
        hook.quiet = True  # type: ignore[attr-defined]
        sys.unraisablehook = hook


def _describes_arrays(arrays: Any) -> bool:
    """Whether a manifest's ``arrays`` is name -> shape and type."""
    if not isinstance(arrays, dict):
        return False
    for kind in arrays.values():
        if not (isinstance(kind, dict) and isinstance(kind.get("shape"), list) and isinstance(kind.get("dtype"), str)):
            return False
        if not all(type(size) is int and size >= 0 for size in kind["shape"]):
            return False
    return True


def _kind(array: Any) -> str:
    """Type and shape, as in ``float32[8,16]``, of an array or of what a manifest says of one."""
    if array is None:
        return "missing"
    found = array if isinstance(array, dict) else {"dtype": array.dtype, "shape": array.shape}
    return f"{found['dtype']}[{','.join(map(str, found['shape']))}]"


def as_tree(state: Any) -> Any:
    """A state as nested dicts with text keys: the layout on disk, whatever containers the optimizer uses."""
    return _nested({tuple(map(key_name, path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)})


def _nested(leaves: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*above, last), leaf in leaves.items():
        node = tree
        for name in above:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def key_name(key: Any) -> str:
    """The text of one step of a tree path."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def path_name(path: tuple) -> str:
    """A tree path as ``a/b/c``."""
    return "/".join(key_name(k) for k in path)


def flatten(tree: Any) -> dict[str, Any]:
    """``a/b/c`` -> leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {path_name(path): leaf for path, leaf in leaves}


# ---------------------------------------------------------------- hashes


PARTS = {"params": "parameters", "opt_state": "optimizer", "rng": "rng", "step": "step"}


def state_hashes(arrays: dict[str, np.ndarray], host: HostState) -> dict[str, str]:
    """SHA-256 of each part of a checkpoint: names, dtypes, shapes and bytes of its arrays; canonical JSON of data."""
    digests: dict[str, Any] = {}
    for name in sorted(arrays):
        part = PARTS.get(name.split("/")[0], name.split("/")[0])
        digest = digests.setdefault(part, hashlib.sha256())
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}|{array.dtype}|{array.shape}|".encode())
        digest.update(array.tobytes())
    hashes = {part: digest.hexdigest() for part, digest in digests.items()}
    for part, value in host.items():
        hashes[part] = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    return dict(sorted(hashes.items()))


def combined_hash(hashes: dict[str, str]) -> str:
    """One SHA-256 over all parts."""
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
