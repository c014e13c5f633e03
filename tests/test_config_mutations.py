"""A thousand mutated overrides: each changes exactly its key, or is refused by name; none is ignored, none crashes."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
from small_runs import small_moe

from dsjax.config import UserError, apply_overrides, keys, load_config, validate
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig

TINY = pathlib.Path(__file__).parent.parent / "configs" / "tiny.py"

VALID = {
    "tiny": ("train.steps=100", "train.max_minutes=0.5", "train.seed=3", "optim.name=muon", "optim.lr=3e-4",
             "optim.schedule=cosine", "optim.decay_share=0.5", "model.d_model=32", "model.tied=true",
             "model.num_layers=4", "model.groups.0.num_layers=2", "model.groups.0.attention.window=16",
             "model.groups.0.attention.qk_norm=true", "model.groups.0.ffn.d_ff=64", "model.ngram=none",
             "data.seq_len=32", "data.special_tokens=<a>,<b>", "data.sources.0.path=stdlib",
             "data.sources.0.weight=2.5", "data.end_token=<end>", "mesh=fsdp=2,tensor=2", "mesh.data=4",
             "compute.dtype=bfloat16", "compute.remat=dots", "compute.unroll=true", "checkpoint.every=5",
             "log.tensorboard=false"),
    "moe": ("model.groups.1.ffn.num_experts=8", "model.groups.1.ffn.top_k=1", "model.groups.1.ffn.routed_scale=2.0",
            "model.groups.1.ffn.normalize_weights=false", "model.groups.0.num_layers=1", "model.groups.0.ffn.d_ff=8",
            "model.groups.1=num_layers=1,ffn.d_ff=4", "mesh=expert=4,data=-1", "model.groups.1.attention.num_heads=4"),
}  # fmt: skip
# fmt: off
VALUES = ("", "-1", "0", "1e3", "1e400", "nan", "-inf", "9" * 30, "9" * 5000, "none", "None", "true", "TRUE", "½", "٣",
          "ｘ", "'", '"', "'a'", "[]", "(1,2", "1,2", ",", ",,", "a=b", "=", "{}", "\\", "\\x00", "\n", " ", " 7 ",
          "0x10", "1_0", "1__0", "🙂", "\udcff", "$(x)", "-", "--run", "..", "fsdp=2", "fsdp=", "=2", "data=-1,data=2",
          "1.", ".5", "1e-400")
# fmt: on


def mutate(override: str, rng: random.Random) -> str:
    key, _, value = override.partition("=")
    at = rng.randrange(len(key))
    other = rng.choice("abcxyz_.019=-[]'\" é")
    segments = key.split(".")
    mutations: list[Callable[[], str]] = [
        lambda: f"{key[:at]}{key[at + 1 :]}={value}",
        lambda: f"{key[:at]}{other}{key[at:]}={value}",
        lambda: f"{key[:at]}{other}{key[at + 1 :]}={value}",
        lambda: f"{key[:at]}{key[at].swapcase()}{key[at + 1 :]}={value}",
        lambda: f"{key.replace('.', '..', 1)}={value}",
        lambda: f"{key.replace('.', '', 1)}={value}",
        lambda: f".{key}={value}",
        lambda: f"{key}.={value}",
        lambda: f"{key}=={value}",
        lambda: f"{key}{value}",
        lambda: key,
        lambda: f"{'.'.join(segments[:-1])}={value}",
        lambda: f"{'.'.join(segments[1:])}={value}",
        lambda: f"{key}.{rng.choice(segments)}={value}",
        lambda: f"{'.'.join(rng.sample(segments, len(segments)))}={value}",
        lambda: re.sub(r"\d", lambda _: rng.choice(["1", "2", "-1", "00", "9" * 20, "٠", "x", ""]), key) + f"={value}",
        lambda: f"{key}={value}{other}",
        lambda: f"{key}={other}{value}",
        lambda: f"{key}={value.swapcase()}",
        *[lambda: f"{key}={rng.choice(VALUES)}"] * 8,
    ]
    return rng.choice(mutations)()


def flat(node: Any, key: str = "") -> dict[str, Any]:
    """Every value by its key; an empty list and a list of plain values are values."""
    if dataclasses.is_dataclass(node):
        items = [(f.name, getattr(node, f.name)) for f in dataclasses.fields(node)]
    elif isinstance(node, tuple) and any(dataclasses.is_dataclass(x) for x in node):
        items = [(str(i), x) for i, x in enumerate(node)]
    else:
        return {key: node}
    return {k: v for name, x in items for k, v in flat(x, f"{key}.{name}" if key else name).items()}


def readings(text: str) -> list[Any]:
    """Every value that a text can stand for, by other means than the code under test."""
    out: list[Any] = [text, {"true": True, "false": False, "none": None}.get(text.lower(), text)]
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        out.append(text[1:-1])
    for read in (int, float):
        if re.fullmatch(r"[\x00-\x7f]+", text):
            with contextlib.suppress(ValueError):
                out.append(read(text))
    inner = text.strip()
    if (inner.startswith("(") and inner.endswith(")")) or (inner.startswith("[") and inner.endswith("]")):
        inner = inner[1:-1]
    items = inner.split(",")
    items = items if items[-1].strip() else items[:-1]
    out.append(tuple(item.strip().strip("'\"") for item in items))
    return out


def attempt(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """The result, or what the user is told; any other exception fails the test."""
    try:
        return call(), None
    except UserError as error:
        return None, str(error)


def check_one(config: Any, overrides: list[str]) -> str:
    """What became of it, after asserting that it is one of the two good endings."""
    mutated = overrides[-1]
    key, equals, text = mutated.partition("=")
    new, error = attempt(lambda: apply_overrides(config, overrides))
    if error is not None:
        assert (key if equals else repr(mutated)[:60]) in error, (mutated, error)
        return "refused"
    pairs = (
        {key: text}
        if key in flat(config)
        else {f"{key}.{p.partition('=')[0]}": p.partition("=")[2] for p in text.split(",")}
    )
    before, after = flat(apply_overrides(config, overrides[:-1])), flat(new)
    for name, value in pairs.items():
        assert any(type(after[name]) is type(v) and after[name] == v for v in readings(value)), (mutated, after[name])
        assert type(after[name]) is type(before[name]) or None in (after[name], before[name])
    assert {k: v for k, v in after.items() if k not in pairs} == {k: v for k, v in before.items() if k not in pairs}
    _, error = attempt(lambda: validate(new))
    return "changed" if error is None else "invalid"


@pytest.mark.parametrize("name", VALID)
def test_each_of_1000_mutated_overrides_changes_its_key_or_is_refused(name: str) -> None:
    config = load_config(TINY) if name == "tiny" else small_moe()
    rng = random.Random(f"{name} 1")
    ends = dict.fromkeys(("refused", "invalid", "changed"), 0)
    for _ in range(1000):
        override = rng.choice(VALID[name])
        overrides = [mutate(override, rng)]
        if rng.random() < 0.2:
            overrides.insert(0, rng.choice(VALID[name]))
        ends[check_one(config, overrides)] += 1
    assert min(ends["refused"], ends["changed"]) > 50, ends  # a test that only ever sees one ending proves little


def test_every_override_that_the_mutations_start_from_is_valid() -> None:
    for name, overrides in VALID.items():
        config = load_config(TINY) if name == "tiny" else small_moe()
        assert {check_one(config, [o]) for o in overrides} <= {"changed", "invalid"}


def test_keys_are_those_of_the_values() -> None:
    config = small_moe()
    assert "model.groups.1.ffn.num_experts" in keys(config)
    assert isinstance(config.model.groups[0].ffn, MLPConfig)
    assert isinstance(config.model.groups[1].ffn, MoEConfig)
    assert set(keys(config)) == set(flat(config))
