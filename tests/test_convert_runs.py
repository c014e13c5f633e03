"""Runs that are converted: for a mesh, trained since, without an origin; and what the comparison of two reports."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from flax import nnx
from hf_folders import ORACLES, Tensors, content, deepseek, in_8_bits, llama, random_tensors, write_folder
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open

import dsjax
from dsjax.checkpoint import Checkpoints, as_tree
from dsjax.config import UserError, to_dict
from dsjax.convert.check import HFSide, RunSide, compare, logits
from dsjax.convert.command import Request, opened, run
from dsjax.convert.families import config_from_hf
from dsjax.convert.names import Variable, read_arrays, variables_of
from dsjax.convert.origin import HFFolder
from dsjax.convert.run_tensors import RunTensors
from dsjax.convert.store import StoredArray, StoredArrays, blocks, read_part, write_part
from dsjax.data.hf_tokenizer import load_hf_tokenizer
from dsjax.data.prepare import DataConfig
from dsjax.data.tokenizer import load_tokenizer, train_tokenizer
from dsjax.models.decoder import Decoder, DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.indexer import IndexerConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.runs import RunFolder
from dsjax.sharding import MeshConfig, make_mesh, split_variables, training_rules
from dsjax.tensor_files import INDEX, TensorFiles
from dsjax.train.pretrain import Pretrain

BF16 = ml_dtypes.bfloat16


def convert(source: pathlib.Path, target: pathlib.Path, **options: Any) -> pathlib.Path:
    assert run(Request(source, target, quiet=True, **options)) == 0
    return target


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """``a/b/c`` -> leaf, as a tree."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        node = tree
        *above, last = name.split("/")
        for part in above:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


# ---------------------------------------------------------------- arrays on disk


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
def test_blocks_are_the_bytes_in_the_order_of_the_axes(order: tuple[int, ...]) -> None:
    x = np.arange(70 * 3 * 300, dtype=np.int32).reshape(70, 3, 300).transpose(order)
    assert b"".join(blocks(x)) == x.tobytes()
    assert b"".join(blocks(x[0].T)) == x[0].T.tobytes()
    assert b"".join(blocks(x[0, 0])) == x[0, 0].tobytes()


@pytest.mark.parametrize("cuts", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_a_part_is_read_as_it_was_written(cuts: tuple[int, int], tmp_path: pathlib.Path) -> None:
    array = StoredArray("params/w", (2, 4, 6), np.dtype(BF16), 1, cuts)
    part = np.random.default_rng(0).standard_normal((6, 4)).astype(BF16).T
    (tmp_path / array.folder).mkdir()
    entry = write_part(tmp_path, array, (1,), part)
    np.testing.assert_array_equal(read_part(tmp_path, array, (1,), entry["sha256"]), part)


MESH = {"expert": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """A run of the V3 oracle, cut for a mesh of eight devices, and its arrays."""
    source, target = ORACLES / "v3", tmp_path_factory.mktemp("cut") / "run"
    convert(source, target, mesh=",".join(f"{axis}={size}" for axis, size in MESH.items()))
    hf = HFFolder(source)
    return target, read_arrays(hf.tensors, hf.config, config_from_hf(hf.config))


def test_orbax_restores_each_array_onto_the_mesh(cut: tuple[pathlib.Path, dict[str, np.ndarray]]) -> None:
    folder, arrays = cut
    config = RunFolder(folder).read_config().model
    mesh, rules = make_mesh(MeshConfig(data=1, **MESH)), training_rules(MeshConfig())

    def placed(v: Variable) -> Any:
        spec: list[tuple[str, ...]] = []
        taken: set[str] = set()
        for axes in rules.spec(*v.axes):  # a mesh axis cuts one axis of an array
            axes = axes if isinstance(axes, tuple) else (axes,) if axes else ()
            spec.append(tuple(a for a in axes if a not in taken))
            taken |= set(axes)
        return jax.ShapeDtypeStruct(v.shape, np.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    tree = nested({name: placed(variable) for name, variable in variables_of(config).items()})
    with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
        restored = checkpointer.restore(folder / "checkpoints" / "0" / "state", tree)
    for path, x in jax.tree_util.tree_leaves_with_path(restored):
        name = "/".join(key.key for key in path)
        np.testing.assert_array_equal(np.asarray(x), arrays[name], err_msg=name)
        assert len(x.addressable_shards) == 8


def test_orbax_restores_bfloat16_as_the_float32_that_training_wants(tmp_path: pathlib.Path) -> None:
    config = llama()
    folder = convert(write_folder(tmp_path / "source", config, random_tensors(config, dtype=BF16)), tmp_path / "run")
    arrays = RunTensors(RunFolder(folder)).arrays()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = nested({n: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=device) for n, x in arrays.items()})
    with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
        restored = checkpointer.restore(folder / "checkpoints" / "0" / "state", tree)
    for path, x in jax.tree_util.tree_leaves_with_path(restored):
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, arrays["/".join(key.key for key in path)].astype(np.float32))


def test_each_device_reads_its_own_part_and_no_more(cut: tuple[pathlib.Path, dict[str, np.ndarray]]) -> None:
    folder, arrays = cut
    name = "params/group_1/ffn/w_up"
    path = folder / "checkpoints" / "0" / "state" / name.replace("/", ".")
    store = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}, read=True).result()
    (L, E, D, F), metric = store.shape, "/tensorstore/kvstore/file/bytes_read"

    def read_bytes() -> int:
        return sum(m["values"][0]["value"] for m in ts.experimental_collect_matching_metrics(metric))

    own = np.s_[:, E // 2 :, : D // 2, F // 2 :]
    before = read_bytes()
    np.testing.assert_array_equal(store[own].read().result(), arrays[name][own])
    table = 16 * 4 * L * (E // 2)  # where the four cuts of each file are
    assert read_bytes() - before == arrays[name][own].nbytes + table
    assert arrays[name][own].nbytes == arrays[name].nbytes // 8


# ---------------------------------------------------------------- trained since


def train(folder: pathlib.Path, change: Any = lambda name, x: x * 1.25 + 0.001) -> dict[str, np.ndarray]:
    """A checkpoint of step 7 as training writes it, in float32, and its arrays; what the model has beside, is new."""
    variables, rng = variables_of(RunFolder(folder).read_config().model), np.random.default_rng(0)
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        arrays, _, _ = checkpoints.load_numpy()
        new = {name: rng.standard_normal(variable.shape) for name, variable in variables.items()} | arrays
        arrays = {name: change(name, new[name].astype(np.float32)) for name in variables}
        tree = nested({name: jax.numpy.asarray(x) for name, x in arrays.items()})
        checkpoints.save(7, tree | {"step": np.int32(7)}, {"loop": {}})
        checkpoints.wait()
    return arrays


@pytest.fixture
def trained(tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path, dict[str, np.ndarray]]:
    """A model in bfloat16 with layers of its own for multi-token prediction, the run, and what was trained."""
    config = deepseek(num_nextn_predict_layers=1, torch_dtype="bfloat16", hidden_size=16)
    source = write_folder(tmp_path / "source", config, random_tensors(config, dtype=BF16), shards=2)
    folder = convert(source, tmp_path / "run")
    return source, folder, train(folder)


def test_what_was_trained_is_exported_as_it_is(
    trained: tuple[pathlib.Path, pathlib.Path, dict[str, np.ndarray]], tmp_path: pathlib.Path
) -> None:
    source, folder, arrays = trained
    back = convert(folder, tmp_path / "back")
    config = json.loads((back / "config.json").read_text())
    assert config["torch_dtype"] == "float32"
    found = read_arrays(TensorFiles(back), config, config_from_hf(config, TensorFiles(back)))
    assert {name: x.tobytes() for name, x in found.items()} == {name: x.tobytes() for name, x in arrays.items()}
    before, files = TensorFiles(source), TensorFiles(back)
    assert {name: files.kind(name).file.name for name in files} == {
        name: before.kind(name).file.name for name in before
    }
    assert files["model.layers.3.embed_tokens.weight"].tobytes() == files["model.embed_tokens.weight"].tobytes()
    for name in ("README.md", ".gitattributes", "generation_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()


def test_the_exported_folder_computes_what_the_trained_run_does(
    trained: tuple[pathlib.Path, pathlib.Path, dict[str, np.ndarray]], tmp_path: pathlib.Path
) -> None:
    _, folder, _ = trained
    back = convert(folder, tmp_path / "back")
    tokens_BT = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(logits(opened(folder), tokens_BT), logits(opened(back), tokens_BT))


def test_weights_are_exported_in_the_type_and_files_that_are_asked_for(
    trained: tuple[pathlib.Path, pathlib.Path, dict[str, np.ndarray]], tmp_path: pathlib.Path
) -> None:
    source, folder, arrays = trained
    back = convert(folder, tmp_path / "back", dtype="bfloat16", max_shard_size="8KB")
    files = TensorFiles(back)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert files[name].tobytes() == arrays["params/group_1/ffn/w_up"][0, 2].T.astype(BF16).tobytes()
    assert files.kind("model.layers.1.mlp.gate.e_score_correction_bias").dtype == np.float32
    assert set(files) == set(TensorFiles(source))
    sizes = [path.stat().st_size for path in back.glob("*.safetensors")]
    shards = sorted(path.name for path in back.glob("*.safetensors"))
    assert shards == [f"model-{i + 1:05d}-of-{len(sizes):05d}.safetensors" for i in range(len(sizes))]
    total = sum(files[name].nbytes for name in files)
    assert total / 8000 < len(sizes) < 2 * total / 8000
    for path in back.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:  # the library reads it
            names = file.keys()
        assert len(names) == 1 or sum(files[name].nbytes for name in names) <= 8000
    assert json.loads((back / INDEX).read_text())["metadata"]["total_size"] == total


@pytest.mark.parametrize(("kind", "scales"), [("deepseek_v3", "float"), ("deepseek_v32", "ue8m0")])
def test_trained_weights_become_8_bit_again_where_it_is_asked_for(
    kind: str, scales: str, tmp_path: pathlib.Path
) -> None:
    quantized = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": scales, "weight_block_size": [8, 8]}
    config = deepseek(kind, quantization_config=quantized, torch_dtype="bfloat16")
    tensors = in_8_bits(random_tensors(config, dtype=BF16), 8)
    source = write_folder(tmp_path / "source", config, tensors)
    folder = convert(source, tmp_path / "run", keep_fp8=True)
    same = "model.layers.0.mlp.up_proj.weight"
    arrays = train(folder, lambda name, x: x if name == "params/group_0/ffn/w_up" else x * 3)
    back = convert(folder, tmp_path / "back", keep_fp8=True)
    files = TensorFiles(back)
    assert json.loads((back / "config.json").read_text()) == config
    assert {name: (files.kind(name).shape, files.kind(name).dtype) for name in files} == {
        name: (x.shape, x.dtype) for name, x in tensors.items()
    }
    assert files[same].tobytes() == tensors[same].tobytes()
    assert files[same + "_scale_inv"].tobytes() == tensors[same + "_scale_inv"].tobytes()
    new = [files[name] for name in files if name.endswith("_scale_inv") and not name.startswith(same)]
    assert all(np.all(np.frexp(scale)[0] == 0.5) for scale in new) == (scales == "ue8m0")  # powers of two
    found = read_arrays(files, config, config_from_hf(config))
    for name, x in found.items():
        # Of 8 bits, 3 stand behind the point: at most 1/16 off, or the same share of the smallest normal number.
        np.testing.assert_allclose(x.astype(np.float32), arrays[name], rtol=0.07, atol=0.002, err_msg=name)
    with pytest.raises(UserError, match=r"--dtype is 'bfloat16'; beside --keep-fp8, .* it must be left out"):
        convert(folder, tmp_path / "other", keep_fp8=True, dtype="bfloat16")
    with pytest.raises(UserError, match="--keep-fp8: the run keeps no scales of 8-bit weights"):
        convert(convert(source, tmp_path / "plain"), tmp_path / "other", keep_fp8=True)


def with_model(folder: pathlib.Path, change: Any) -> pathlib.Path:
    """The run, its model after ``change``."""
    config = RunFolder(folder).read_config()
    data = dataclasses.replace(config.data, seq_len=48)
    config = dataclasses.replace(config, model=change(config.model), data=data)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    return folder


def attending(**fields: Any) -> Any:
    """Changes the attention of a model."""

    def change(model: DecoderConfig) -> DecoderConfig:
        groups = [dataclasses.replace(g, attention=dataclasses.replace(g.attention, **fields)) for g in model.groups]
        return dataclasses.replace(model, groups=tuple(groups))

    return change


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        (llama(), attending(rope_theta=5e5), {"rope_theta": 5e5, "max_position_embeddings": 48}),
        (
            deepseek(num_hidden_layers=1),
            attending(indexer=IndexerConfig(2, 8, 3)),
            {"model_type": "deepseek_v32", "index_topk": 3, "max_position_embeddings": 64},
        ),
        (
            deepseek(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=1),
            lambda model: dataclasses.replace(model, norm_eps=0.1, multi_token=None),
            {"rms_norm_eps": 0.1, "num_nextn_predict_layers": 0, "max_position_embeddings": 64},
        ),
    ],
    ids=["angles", "indexer", "no further tokens"],
)
def test_a_model_that_training_made_another_one_is_exported_as_it_is_now(
    config: dict[str, Any], change: Any, said: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    """Its config.json and files of weights are new; what belongs to its texts stays."""
    source = write_folder(tmp_path / "source", config | {"eos_token_id": [1, 3]}, random_tensors(config), shards=2)
    folder = with_model(convert(source, tmp_path / "run"), change)
    train(folder)
    back = convert(folder, tmp_path / "back")
    tokens_BT = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(logits(opened(folder), tokens_BT), logits(opened(back), tokens_BT))
    found = json.loads((back / "config.json").read_text())
    said = said | {"eos_token_id": [1, 3]}
    assert {name: found[name] for name in said} == said
    assert set(RunTensors(RunFolder(folder))) == set(TensorFiles(back))
    assert dsjax.load(folder).max_length == found["max_position_embeddings"]
    assert not (back / INDEX).exists()
    for name in ("README.md", ".gitattributes", "generation_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()


def test_a_model_that_became_one_of_no_family_is_refused(tmp_path: pathlib.Path) -> None:
    config = llama()
    folder = convert(write_folder(tmp_path / "source", config, random_tensors(config)), tmp_path / "run")
    with pytest.raises(UserError, match="the model has a window, which no model type of Hugging Face's"):
        convert(with_model(folder, attending(window=4)), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_what_only_training_uses_makes_no_other_model(tmp_path: pathlib.Path) -> None:
    config = deepseek("deepseek_v2", torch_dtype="bfloat16")
    source = write_folder(tmp_path / "source", config, random_tensors(config, dtype=BF16), shards=2)

    def change(model: DecoderConfig) -> DecoderConfig:
        dense, experts = model.groups
        ffn = dataclasses.replace(experts.ffn, sequence_coef=0.5, capacity=1.5, num_replicas=2)
        return dataclasses.replace(model, groups=(dense, dataclasses.replace(experts, ffn=ffn)))

    folder = with_model(convert(source, tmp_path / "run"), change)
    train(folder)
    back = convert(folder, tmp_path / "back", dtype="bfloat16")
    assert json.loads((back / "config.json").read_text()) == config
    before, files = TensorFiles(source), TensorFiles(back)
    assert {n: files.kind(n).file.name for n in files} == {n: before.kind(n).file.name for n in before}


# ---------------------------------------------------------------- trained here


def fresh_run(folder: pathlib.Path, model: DecoderConfig) -> pathlib.Path:
    """A run of a model with new weights, as training makes it."""
    config = Pretrain(model=model, data=DataConfig(vocab_size=300, seq_len=48))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "tokenizer.json").write_text(train_tokenizer(["some words"], 260).to_json())
    _, params, buffers = split_variables(Decoder(model, rngs=nnx.Rngs(3)))
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        checkpoints.save(5, as_tree({"params": params, "buffers": buffers, "step": np.int32(5)}), {})
        checkpoints.wait()
    return folder


GROUP = LayerGroup(MLPConfig(24), AttentionConfig(4, 2, 8))
SMALL = DecoderConfig(vocab_size=300, d_model=16, num_layers=3, groups=(GROUP,))


def test_a_model_that_was_trained_here_is_exported_with_its_tokenizer(tmp_path: pathlib.Path) -> None:
    folder = fresh_run(tmp_path / "run", SMALL)
    back = convert(folder, tmp_path / "back")
    config = json.loads((back / "config.json").read_text())
    assert (config["model_type"], config["max_position_embeddings"], config["eos_token_id"]) == ("llama", 48, 0)
    assert config_from_hf(config) == dataclasses.replace(SMALL, groups=(dataclasses.replace(GROUP, num_layers=3),))
    ours, theirs = load_tokenizer(folder / "tokenizer.json"), load_hf_tokenizer(back)
    assert theirs.tokenizer.begin_ids == theirs.tokenizer.put_in_front() == ours.begin_ids == (0,)
    assert theirs.tokenizer.encode("some é").tolist() == ours.encode("some é").tolist()
    assert theirs.end_ids == (ours.end_id,)
    tokens_BT = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(logits(opened(folder), tokens_BT), logits(opened(back), tokens_BT))
    again = convert(back, tmp_path / "again")
    assert content(convert(again, tmp_path / "back2")) == content(back)


@pytest.mark.parametrize(
    "options", [{"mesh": "fsdp=2"}, {"keep_fp8": True}, {"dtype": "float32"}, {"max_shard_size": "5GB"}]
)
def test_a_comparison_takes_no_options_of_a_conversion(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(options)).replace('_', '-')} does not go with --check"):
        run(Request(pathlib.Path("a"), pathlib.Path("b"), check=True, **options))


def test_what_no_family_has_is_named(tmp_path: pathlib.Path) -> None:
    attention = AttentionConfig(4, 2, 8, conv_taps=3)
    model = dataclasses.replace(SMALL, groups=(LayerGroup(MLPConfig(24), attention),))
    folder = fresh_run(tmp_path / "run", model)
    with pytest.raises(UserError, match="the model has convolutions, which no model type of Hugging Face"):
        convert(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_run_without_a_checkpoint_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_dict(Pretrain())))
    with pytest.raises(UserError, match="has no checkpoint yet"):
        convert(tmp_path / "run", tmp_path / "back")


# ---------------------------------------------------------------- reports


def reported(source: pathlib.Path, target: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = run(Request(source, target, check=True, quiet=True))
    return code, capsys.readouterr().out


def test_a_report_names_the_tensors_that_differ_and_by_how_much(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = llama()
    tensors = random_tensors(config)
    source = write_folder(tmp_path / "source", config, tensors)
    other: Tensors = {name: x.copy() for name, x in tensors.items()}
    name = "model.layers.2.mlp.up_proj.weight"
    other[name][3, 4] += 0.5
    other["model.norm.weight"][0] = np.nextafter(other["model.norm.weight"][0], np.float32(9))
    code, said = reported(source, write_folder(tmp_path / "other", config, other), capsys)
    assert code == 3
    assert f"{len(tensors)} compared" in said
    assert f"{len(tensors) - 2} equal to the bit" in said
    lines = said.splitlines()
    assert lines[3] == f"  {name}: differ by up to 0.5 (float32)"
    assert lines[4].startswith("  model.norm.weight: differ by up to ")
    assert lines[-1].startswith("logits: differ by up to ")
    code, said = reported(source, source, capsys)
    assert (code, said.splitlines()[-1]) == (0, "logits: equal to the bit")


def test_a_report_on_one_folder_brings_each_tensor_there_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    code = run(Request(ORACLES / "v3_yarn", None, check=True, quiet=True))
    said = capsys.readouterr().out.splitlines()
    assert code == 0
    assert said[-2:] == [
        "tensors: 129 compared, 405,880 numbers; 129 equal to the bit",
        "logits: not compared: there is one checkpoint",
    ]


def test_differences_are_found_at_numbers_that_are_none(tmp_path: pathlib.Path) -> None:
    config = llama()
    tensors = random_tensors(config)
    tensors["model.norm.weight"][3] = np.nan
    sides = []
    for name in ("a", "b"):
        sides.append(HFSide(HFFolder(write_folder(tmp_path / name, config, tensors)), config_from_hf(config)))
        tensors["model.norm.weight"][4] = np.nan
    report = compare(*sides)
    assert [(d.name, d.largest) for d in report.differences] == [("model.norm.weight", np.inf)]
    assert compare(sides[0], sides[0]).differences == []


def test_arrays_that_orbax_wrote_are_read_by_parts(tmp_path: pathlib.Path) -> None:
    folder = fresh_run(tmp_path / "run", SMALL)
    with contextlib.closing(RunFolder(folder).open_checkpoints()) as checkpoints:
        arrays, _, step = checkpoints.load_numpy()
    stored = StoredArrays(folder / "checkpoints" / str(step), checkpoints.about(step)["files"], list(arrays))
    assert not stored.by_parts
    for name in ("params/group_0/attention/w_q", "params/embedding"):
        assert stored.dtype(name) == arrays[name].dtype
        np.testing.assert_array_equal(stored.whole(name), arrays[name])
        np.testing.assert_array_equal(stored.part(name, (1,)), arrays[name][1])
    assert isinstance(opened(folder), RunSide)
    assert RunTensors(RunFolder(folder)).step == step == 5
