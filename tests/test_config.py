"""Configs: overrides, checks, files. Nothing that a user can write ends in a traceback or is ignored."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from typing import Annotated, Any, Literal

import pytest
from small_runs import small_moe

from dsjax.config import (
    Bounds,
    PositiveInt,
    UserError,
    apply_overrides,
    from_dict,
    load_config,
    read_json,
    to_dict,
    validate,
)
from dsjax.nn.history import NgramConfig
from dsjax.train import pretrain

ROOT = pathlib.Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.py"


@dataclasses.dataclass(frozen=True)
class Dense:
    width: PositiveInt = 4


@dataclasses.dataclass(frozen=True)
class Sparse:
    experts: PositiveInt = 8


@dataclasses.dataclass(frozen=True)
class Layer:
    ffn: Dense | Sparse = Dense()
    depth: PositiveInt | None = None


@dataclasses.dataclass(frozen=True)
class Mesh:
    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Every:
    count: Annotated[int, Bounds(ge=1, lt=100)] = 1
    rate: Annotated[float, Bounds(gt=0)] = 0.5
    flag: bool = False
    kind: Literal["linear", "cosine"] = "linear"
    level: Literal[1, 2] = 1
    name: str = "x"
    window: PositiveInt | None = None
    sizes: tuple[int, ...] = (2, 3)
    tags: tuple[str, ...] = ()
    layers: tuple[Layer, ...] = (Layer(), Layer(Sparse(), 3))
    mesh: Mesh = Mesh()
    extra: Dense | None = None


# ---------------------------------------------------------------- each kind of field


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("count=7", Every(count=7)),
        ("count=1_0", Every(count=10)),
        ("rate=3e-4", Every(rate=3e-4)),
        ("rate=2", Every(rate=2.0)),
        ("flag=true", Every(flag=True)),
        ("flag=False", Every(flag=False)),
        ("kind=cosine", Every(kind="cosine")),
        ("level=2", Every(level=2)),
        ("name=a=b", Every(name="a=b")),
        ("name=", Every(name="")),
        ("name='2'", Every(name="2")),
        ("window=5", Every(window=5)),
        ("window=none", Every(window=None)),
        ("sizes=4,5", Every(sizes=(4, 5))),
        ("sizes=(4,)", Every(sizes=(4,))),
        ("sizes=", Every(sizes=())),
        ("sizes.1=9", Every(sizes=(2, 9))),
        ("tags=a, b", Every(tags=("a", "b"))),
        ("tags=[A],[B]", Every(tags=("[A]", "[B]"))),
        ("layers.1.depth=2", Every(layers=(Layer(), Layer(Sparse(), 2)))),
        ("layers.0.ffn.width=8", Every(layers=(Layer(Dense(8)), Layer(Sparse(), 3)))),
        ("layers.1.ffn.experts=2", Every(layers=(Layer(), Layer(Sparse(2), 3)))),
        ("layers.1=depth=5,ffn.experts=2", Every(layers=(Layer(), Layer(Sparse(2), 5)))),
        ("mesh=fsdp=2,tensor=4", Every(mesh=Mesh(fsdp=2, tensor=4))),
        ("mesh.data=2", Every(mesh=Mesh(data=2))),
    ],
)
def test_an_override_changes_its_key_to_the_typed_value(override: str, expected: Every) -> None:
    found = apply_overrides(Every(), [override])
    assert found == expected
    assert repr(found) == repr(expected)  # 1 == True == 1.0


def test_an_optional_part_can_be_left_out() -> None:
    assert apply_overrides(Every(extra=Dense(2)), ["extra=none"]).extra is None


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("count=3.5", "count is '3.5'; it must be an integer >= 1 and < 100"),
        ("count=1e3", "count is '1e3'; it must be an integer >= 1 and < 100"),
        ("count=", "count is ''; it must be an integer >= 1 and < 100"),
        ("count=٣", "count is '٣'; it must be an integer >= 1 and < 100"),
        ("rate=nan", "rate is 'nan'; it must be a number > 0"),
        ("rate=1e400", "rate is '1e400'; it must be a number > 0"),
        ("flag=1", "flag is '1'; it must be true or false"),
        ("kind=cosin", "kind is 'cosin'; it must be one of linear, cosine; did you mean cosine?"),
        ("window=wide", "window is 'wide'; it must be an integer >= 1 and < 2,147,483,648 or none"),
        ("sizes=1,x", "sizes is 'x'; it must be an integer"),
        ("sizes=1,,2", "sizes is ''; it must be an integer"),
        ("sizes.2=1", "unknown key sizes.2; sizes is a list without an entry '2': its entries are 0 to 1"),
        ("sizes.01=1", "unknown key sizes.01; sizes is a list without an entry '01': its entries are 0 to 1"),
        ("tags.0=1", "unknown key tags.0; tags is a list without an entry '0': it is empty"),
        ("layers=2", "layers is a list; set its parts, for example layers.0.NAME=VALUE"),
        ("layers.0.ffn=moe", "layers.0.ffn is a group of keys (width), found 'moe'; write layers.0.ffn.NAME=VALUE"),
        ("layers.0.ffn.experts=2", "unknown key layers.0.ffn.experts; did you mean layers.1.ffn.experts?"),
        ("mesh=2", "mesh is a group of keys (data, fsdp, tensor), found '2'; write mesh.NAME=VALUE"),
        ("mesh=fsdp=2,", "mesh is a group of keys (data, fsdp, tensor), found 'fsdp=2,'; write mesh.NAME=VALUE"),
        ("mesh=fsdp=2,fsdp=4", "mesh.fsdp is given twice, mesh.fsdp='2' and mesh.fsdp='4'; give it once"),
        ("mesh=fspd=2", "unknown key mesh.fspd; did you mean mesh.fsdp?"),
        ("mehs=fsdp=2", "unknown key mehs; did you mean mesh?"),
        ("mehs.fsdp=2", "unknown key mehs.fsdp; did you mean mesh.fsdp?"),
        ("count.x=2", "unknown key count.x; count is the single value 1"),
        ("extra.width=2", "unknown key extra.width; extra is none; the config file can set it to Dense()"),
        ("count", "override 'count' is not of the form key=value, for example train.steps=100"),
        ("=3", "override '=3' is not of the form key=value, for example train.steps=100"),
    ],
)
def test_a_wrong_override_is_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        apply_overrides(Every(), [override])
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    "overrides",
    [
        ["count=1", "count=1"],
        ["mesh=fsdp=2", "mesh.fsdp=4"],
        ["mesh.fsdp=4", "mesh=tensor=2,fsdp=2"],
        ["sizes=4,5", "sizes.0=1"],
        ["sizes.0=1", "sizes=4,5"],
    ],
)
def test_a_key_given_twice_is_refused(overrides: list[str]) -> None:
    with pytest.raises(UserError, match="is given twice"):
        apply_overrides(Every(), overrides)


def test_a_part_set_and_left_out_is_refused() -> None:
    with pytest.raises(UserError, match="is given twice"):
        apply_overrides(Every(extra=Dense()), ["extra.width=3", "extra=none"])


# ---------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (Every(count=0), "count is 0; it must be an integer >= 1 and < 100"),
        (Every(count=100), "count is 100; it must be an integer >= 1 and < 100"),
        (Every(count=True), "count is True; it must be an integer >= 1 and < 100"),
        (Every(count=2.0), "count is 2.0; it must be an integer >= 1 and < 100"),
        (Every(rate=0), "rate is 0; it must be a number > 0"),
        (Every(rate=math.inf), "rate is inf; it must be a number > 0"),
        (Every(rate=10**400), f"rate is 1{'0' * 59}... (401 characters); it must be a number > 0"),
        (Every(rate="1"), "rate is '1'; it must be a number > 0"),
        (Every(level=True), "level is True; it must be one of 1, 2"),
        (Every(sizes=[1]), "sizes is [1]; it must be a list of an integer"),
        (Every(sizes=(1, "2")), "sizes.1 is '2'; it must be an integer"),
        (Every(layers=(Layer(ffn=Mesh()),)), "layers.0.ffn is a Mesh; it must be Dense or Sparse"),
        (
            Every(layers=(Layer(Dense(0)),)),
            "layers.0.ffn.width is 0; it must be an integer >= 1 and < 2,147,483,648",
        ),
        (Every(extra=3), "extra is 3; it must be Dense or none"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_bounds(config: Every, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        validate(config)
    assert str(error.value) == sentence


def test_what_only_the_class_knows_is_named_with_the_full_key() -> None:
    config = apply_overrides(load_config(TINY), ["model.groups.0.attention.head_dim=7"])
    with pytest.raises(UserError, match=r"^model\.groups\.0\.attention\.head_dim is 7; it must be even"):
        validate(config)


@pytest.mark.parametrize(
    "override",
    [
        "model.groups.0.attention.num_kv_heads=3",
        "model.groups.0.attention.window=0",
        "model.groups.0.num_layers=3",
        "model.vocab_size=511",
        "data.vocab_size=100",
        "data.sources.0.weight=0",
        "data.held_out_share=1",
        "train.accumulate=3",
        "train.steps=2147483648",
        "train.seed=-1",
        "checkpoint.keep=0",
        "mesh.data=0",
        "mesh=data=-1,fsdp=-1",
    ],
)
def test_sizes_that_do_not_go_together_are_refused(override: str) -> None:
    with pytest.raises(UserError):
        validate(apply_overrides(load_config(TINY), [override]))


# ---------------------------------------------------------------- what fits the machine


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("mesh.data=3", "mesh"),
        ("mesh=data=1,tensor=16", "tensor=16"),
        ("mesh.expert=-8", "mesh.expert"),
        ("data.batch_size=12", "data.batch_size"),
        ("train.accumulate=4", "data.batch_size / train.accumulate is 2"),
        ("mesh=data=1,tensor=8 model.groups.0.attention.num_kv_heads=4", "mesh.tensor is 8"),
        ("mesh=data=1,context=8 data.seq_len=60", "mesh.context is 8; it must divide data.seq_len, 60"),
        ("model.d_model=1000000000000", "model.d_model is 1000000000000; it must be an integer"),
        ("model.groups.0.attention.window=1000000000000", "model.groups.0.attention.window is 1000000000000"),
        ("optim.lr=1e300", "optim.lr is 1e+300; it must be a number > 0 and < 1e+38"),
        ("model.d_model=2000000000", "model.d_model=2000000000"),
        ("model.num_layers=2000000000", "model.num_layers=2000000000"),
        ("model.vocab_size=2000000000", "model.vocab_size=2000000000"),
        ("model.groups.0.ffn.d_ff=2000000000", "this machine has"),
        ("data.seq_len=2000000000", "data.seq_len=2000000000"),
        ("data.batch_size=2000000000", "data.batch_size=2000000000"),
    ],
)
def test_what_does_not_fit_eight_devices_or_the_memory_is_refused_before_compiling(override: str, named: str) -> None:
    config = apply_overrides(load_config(TINY), override.split())

    def check() -> None:
        validate(config)
        pretrain.check(config)

    with pytest.raises(UserError) as error:
        check()
    assert named in str(error.value)


# ---------------------------------------------------------------- round trip


@pytest.mark.parametrize("config", [load_config(TINY), small_moe()], ids=["tiny", "moe"])
def test_a_config_comes_back_from_json(config: Any) -> None:
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_a_config_with_every_part_comes_back_from_json() -> None:
    config = load_config(TINY)
    model = dataclasses.replace(config.model, ngram=NgramConfig(sizes=(2, 3)))
    config = dataclasses.replace(config, model=model)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"type": "subprocess:Popen", "args": "true"}, "subprocess:Popen"),
        ({"type": "dsjax.runtime:pathlib.Path"}, "none of dsjax"),
        ({"type": "dsjax.checkpoint:Checkpoints"}, "no config of this version"),
        ({"type": "dsjax.train.pretrain:Nothing"}, "no config of this version"),
        ({"type": "dsjax.nowhere:Pretrain"}, "no config of this version"),
        ({"type": "dsjax.runs:RunFolder", "path": "x"}, "no config of this version"),
        ({"type": 3}, "none of dsjax"),
        ({}, "none of dsjax"),
        ([], "holds no config"),
        (None, "holds no config"),
        ({"type": "dsjax.nn.mlp:MLPConfig", "d_fff": 3}, "config.json: unknown key 'd_fff'; did you mean d_ff"),
        ({"type": "dsjax.nn.mlp:MLPConfig", "d_ff": "3"}, "d_ff is '3'"),
        ({"type": "dsjax.nn.mlp:MLPConfig", "d_ff": float("nan")}, "d_ff is nan"),
        ({"type": "dsjax.models.decoder:LayerGroup", "ffn": {"type": "dsjax.nn.norm:RMSNorm"}}, "no config"),
        ({"type": "dsjax.models.decoder:LayerGroup", "ffn": []}, r"ffn is \(\)"),
    ],
)
def test_data_that_is_no_config_is_refused(data: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        from_dict(data)


def test_data_nested_without_end_is_refused() -> None:
    data: Any = []
    for _ in range(100_000):
        data = [data]
    with pytest.raises(UserError, match="nested too deeply"):
        from_dict(data)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[" * 200_000, b"1" * 5000], ids=repr)
def test_a_file_that_is_not_json_is_refused(content: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        read_json(tmp_path / "config.json")


def test_a_json_path_that_is_no_file_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="no file"):
        read_json(tmp_path / "missing.json")
    with pytest.raises(UserError, match="can not be read: Is a directory"):
        read_json(tmp_path)


# ---------------------------------------------------------------- config files


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("def get_config(:", "config {path} fails to load: SyntaxError: "),
        ("x = 1", "config {path} has no function get_config()"),
        ("get_config = 3", "config {path} has no function get_config()"),
        ("def get_config():\n    return 1 / 0", "config {path}:2 fails to load: ZeroDivisionError: division by zero"),
        ("import nowhere_to_be_found", "config {path}:1 fails to load: ModuleNotFoundError: "),
        ("raise SystemExit(3)", "config {path}:1 fails to load: SystemExit: 3"),
        ("def get_config(size): ...", "config {path} fails to load: TypeError: "),
        ("def get_config(): return {}", "get_config() of {path} returned dict, not a config dataclass"),
        ("def get_config(): return None", "get_config() of {path} returned NoneType, not a config dataclass"),
        ("from dsjax.train.pretrain import Pretrain\ndef get_config(): return Pretrain",
         "get_config() of {path} returned type, not a config dataclass"),
    ],
)  # fmt: skip
def test_a_config_file_that_does_not_work_is_one_sentence(content: str, sentence: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(sentence.format(path=path))):
        load_config(path)


def test_a_missing_config_file_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no config file .*tinny\.py; did you mean .*tiny\.py\?"):
        load_config(TINY.with_name("tinny.py"))


def test_a_config_must_be_a_python_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "c.yaml").write_text("a: 1")
    with pytest.raises(UserError, match="must be a Python file"):
        load_config(tmp_path / "c.yaml")


def test_a_path_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(UserError, match="no config file"):
        load_config("a" * 5000)


def test_a_variant_imports_the_config_beside_it(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a_base_config.py").write_text(TINY.read_text())
    variant = "import dataclasses\nfrom a_base_config import get_config as base\n"
    (tmp_path / "variant.py").write_text(
        variant + "def get_config(): return dataclasses.replace(base(), log=base().log)\n"
    )
    assert load_config(tmp_path / "variant.py") == load_config(TINY)


def test_variants_in_two_folders_import_each_the_config_beside_it(tmp_path: pathlib.Path) -> None:
    for steps in (1, 2):
        folder = tmp_path / str(steps)
        folder.mkdir()
        (folder / "one_of_two_bases.py").write_text(f"STEPS = {steps}\n")
        variant = "from dsjax.train.pretrain import TrainConfig\nfrom one_of_two_bases import STEPS\n"
        (folder / "variant.py").write_text(f"{variant}def get_config(): return TrainConfig(steps=STEPS)\n")
    found = [load_config(tmp_path / str(steps) / "variant.py").steps for steps in (1, 2, 1, 1, 2)]
    assert found == [1, 2, 1, 1, 2]
