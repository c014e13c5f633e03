"""A manifest says what a folder holds; whatever else the folder holds is noticed and named."""

from __future__ import annotations

import json
import os
import pathlib
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax import manifest
from dsjax.manifest import Damaged


def sealed(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    manifest.write(folder, {"step": 3}, manifest.inventory(folder, manifest.files_of(folder)))
    return folder


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return sealed(
        tmp_path / "30", {"host.json": b"{}", "state/d/a": b"abc" * 100, "state/d/b": b"x", "state/empty": b""}
    )


def check(folder: pathlib.Path) -> None:
    manifest.verify(folder, manifest.read(folder))


def test_what_was_written_verifies(folder: pathlib.Path) -> None:
    body = manifest.read(folder)
    assert body["step"] == 3
    assert {name: entry["bytes"] for name, entry in body["files"].items()} == {
        "host.json": 2, "state/d/a": 300, "state/d/b": 1, "state/empty": 0,
    }  # fmt: skip
    check(folder)


def test_files_that_a_file_system_adds_are_no_damage(folder: pathlib.Path) -> None:
    (folder / "state" / ".nfs0001").write_text("x")
    (folder / ".snapshot").mkdir()
    (folder / ".snapshot" / "a").write_text("x")
    check(folder)


DAMAGE: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "cut": (lambda f: os.truncate(f / "state/d/a", 299), "state/d/a has 299 bytes instead of 300"),
    "grown": (lambda f: (f / "state/empty").write_bytes(b"x"), "state/empty has 1 bytes instead of 0"),
    "flipped": (lambda f: (f / "state/d/b").write_bytes(b"y"), "state/d/b was changed: its SHA-256 is"),
    "missing": (lambda f: (f / "state/d/a").unlink(), "state/d/a is missing"),
    "strange": (lambda f: (f / "state/d/c").write_bytes(b"x"), "state/d/c is not in its manifest.json"),
    "link": (lambda f: ((f / "host.json").unlink(), (f / "host.json").symlink_to("state/d/b")), "host.json is no file"),
    "linked folder": (
        lambda f: ((f / "state/d").rename(f.parent / "d"), (f / "state/d").symlink_to(f.parent / "d")),
        "state/d is not in its manifest.json",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "empty manifest": (lambda f: os.truncate(f / "manifest.json", 0), "manifest.json is no JSON"),
    "no body": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json has no body"),
    "huge manifest": (lambda f: os.truncate(f / "manifest.json", 2**28 + 1), "manifest.json has 268435457 bytes"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(kind: str, folder: pathlib.Path) -> None:
    do, sentence = DAMAGE[kind]
    do(folder)
    with pytest.raises(Damaged, match=sentence):
        check(folder)


def rewritten(folder: pathlib.Path, change: Callable[[dict[str, Any]], Any], *, seal: bool) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    change(content["body"])
    if seal:
        content["sha256"] = manifest.seal(content["body"])
    (folder / "manifest.json").write_text(json.dumps(content))


def test_a_changed_manifest_is_noticed_whatever_changed(folder: pathlib.Path) -> None:
    rewritten(folder, lambda body: body.update(step=4), seal=False)
    with pytest.raises(Damaged, match=r"manifest.json was changed"):
        check(folder)


@pytest.mark.parametrize(
    "name",
    ["../30/host.json", "/host.json", "a/../../b", "a//b", "./host.json", "..", "a\\b", "c:/x", "a/", "a\0b", "a\nb"],
)
def test_no_name_leads_out_of_the_folder(name: str, folder: pathlib.Path) -> None:
    entry = {"bytes": 0, "sha256": "0" * 64}
    rewritten(folder, lambda body: body["files"].update({name: entry}), seal=True)
    with pytest.raises(Damaged, match="outside its folder"):
        manifest.read(folder)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        {"bytes": -1, "sha256": "0" * 64},
        {"bytes": True, "sha256": "0" * 64},
        {"bytes": 1, "sha256": "0" * 63},
    ],
)
def test_an_entry_has_a_size_and_a_hash(entry: Any, folder: pathlib.Path) -> None:
    rewritten(folder, lambda body: body["files"].update({"host.json": entry}), seal=True)
    with pytest.raises(Damaged, match=r"states no size and SHA-256 of host.json"):
        manifest.read(folder)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_processes_that_share_the_work_look_at_every_file_once(
    parts: int, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[str] = []
    monkeypatch.setattr(manifest, "_check_content", lambda folder, name, sha256: looked_at.append(name))
    for part in range(parts):
        manifest.verify(folder, manifest.read(folder), part=part, parts=parts)
    assert sorted(looked_at) == manifest.files_of(folder)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_every_single_flipped_bit_is_noticed(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = sealed(tmp_path_factory.mktemp("flip") / "7", {"a": b"some content", "b/c": bytes(range(50))})
    rng = random.Random(seed)
    path = folder / rng.choice(["a", "b/c", "manifest.json"])
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    with pytest.raises(Damaged, match=path.name):
        check(folder)
