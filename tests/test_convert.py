"""Conversion both ways: each number is in its place, and what comes back is what went in, file by file."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import hf_folders
import ml_dtypes
import numpy as np
import pytest
from hf_folders import ORACLES, content, deepseek, llama, moe_16b, random_tensors, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import home

import dsjax
from dsjax.cli import main
from dsjax.config import UserError
from dsjax.convert.check import RunSide, logits
from dsjax.convert.command import Request, run
from dsjax.convert.families import config_from_hf
from dsjax.convert.names import places, read_arrays, variables_of
from dsjax.convert.run_tensors import RunTensors
from dsjax.data.tokenizer import train_tokenizer
from dsjax.nn.routing_losses import EntropyConstraint
from dsjax.runs import RunFolder, load_model
from dsjax.tensor_files import TensorFiles

NAMES = ("llama_mha", "llama_coder_lin4", "v2_lite_yarn", "v3", "v3_yarn", "v32")


def there_and_back(source: pathlib.Path, folder: pathlib.Path, **options: Any) -> tuple[pathlib.Path, pathlib.Path]:
    """The run that a folder becomes, and the folder that the run becomes."""
    middle, back = folder / "run", folder / "back"
    assert run(Request(source, middle, quiet=True, **options)) == 0
    assert run(Request(middle, back, quiet=True)) == 0
    return middle, back


# ---------------------------------------------------------------- each number in its place


def arrays_of(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        path = write_folder(pathlib.Path(folder), config, tensors)
        return read_arrays(TensorFiles(path), config, config_from_hf(config))


def halves(x: np.ndarray) -> np.ndarray:
    """Of (..., pairs * 2) the first of each pair, then the second of each."""
    return np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


@pytest.mark.parametrize("interleaved", [True, False])
def test_latent_attention_multiplies_by_the_matrices_of_the_file(interleaved: bool) -> None:
    config = deepseek(rope_interleave=interleaved)
    tensors = random_tensors(config)
    arrays, prefix = arrays_of(config, tensors), "model.layers.2.self_attn."
    ours = {
        name.rpartition("/")[2]: x[1] for name, x in arrays.items() if name.startswith("params/group_1/attention/w")
    }
    x = np.random.default_rng(1).standard_normal((5, 12)).astype(np.float32)
    latent = np.random.default_rng(2).standard_normal((5, 14)).astype(np.float32)
    kv = np.random.default_rng(3).standard_normal((5, 16)).astype(np.float32)
    order = halves if interleaved else np.asarray

    q = (latent @ tensors[prefix + "q_b_proj.weight"].T).reshape(5, 4, 10)
    q = np.concatenate([q[..., :6], order(q[..., 6:])], axis=-1)
    np.testing.assert_allclose(np.einsum("TQ,QNH->TNH", latent, ours["w_q_up"]), q, rtol=1e-5, atol=1e-6)  # f32 sums
    down = x @ tensors[prefix + "kv_a_proj_with_mqa.weight"].T
    down = np.concatenate([down[:, :16], order(down[:, 16:])], axis=-1)
    np.testing.assert_allclose(x @ ours["w_kv_down"], down, rtol=1e-5, atol=1e-6)
    k, v = np.split((kv @ tensors[prefix + "kv_b_proj.weight"].T).reshape(5, 4, 16), [6], axis=-1)
    np.testing.assert_allclose(np.einsum("TR,RNH->TNH", kv, ours["w_k_up"]), k, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.einsum("TR,RNH->TNH", kv, ours["w_v_up"]), v, rtol=1e-5, atol=1e-6)
    out = v.reshape(5, 40) @ tensors[prefix + "o_proj.weight"].T
    np.testing.assert_allclose(np.einsum("TNH,NHD->TD", v, ours["w_out"]), out, rtol=1e-5, atol=1e-6)


def test_an_indexer_multiplies_by_the_matrices_of_the_file() -> None:
    """No channel has another place: the rotary ones are first, half apart, in the file as in the decoder."""
    config = deepseek("deepseek_v32")
    tensors = random_tensors(config)
    arrays, prefix = arrays_of(config, tensors), "model.layers.2.self_attn.indexer."
    ours = {name: arrays[f"params/group_1/attention/indexer/{name}"][1] for name in ("w_q", "w_k", "w_heads")}
    latent = np.random.default_rng(2).standard_normal((5, 14)).astype(np.float32)
    q = (latent @ tensors[prefix + "wq_b.weight"].T).reshape(5, 3, 8)
    np.testing.assert_allclose(np.einsum("TQ,Qhd->Thd", latent, ours["w_q"]), q, rtol=1e-5, atol=1e-6)  # f32 sums
    np.testing.assert_array_equal(ours["w_k"], tensors[prefix + "wk.weight"].T)
    np.testing.assert_array_equal(ours["w_heads"], tensors[prefix + "weights_proj.weight"].T)
    for name in ("scale", "bias"):
        of = "weight" if name == "scale" else name
        found = arrays[f"params/group_1/attention/indexer/k_norm/{name}"][1]
        np.testing.assert_array_equal(found, tensors[f"{prefix}k_norm.{of}"])


def test_grouped_queries_and_their_biases_are_those_of_the_file() -> None:
    config = llama(model_type="qwen2", num_attention_heads=6, num_key_value_heads=2, head_dim=2)
    tensors = random_tensors(config)
    arrays, prefix = arrays_of(config, tensors), "model.layers.1.self_attn."
    x = np.random.default_rng(1).standard_normal((5, 12)).astype(np.float32)
    q = x @ tensors[prefix + "q_proj.weight"].T + tensors[prefix + "q_proj.bias"]
    ours = np.einsum("TD,DKGH->TKGH", x, arrays["params/group_0/attention/w_q"][1])
    ours = ours + arrays["params/group_0/attention/b_q"][1]
    # Query head n of the file shares the key of head n // 3.
    np.testing.assert_allclose(ours[:, 1, 2], q.reshape(5, 6, 2)[:, 5], rtol=1e-5, atol=1e-6)  # f32 sums


def test_experts_and_layers_are_counted_as_in_the_file() -> None:
    config = deepseek(num_hidden_layers=4, first_k_dense_replace=2)
    tensors = random_tensors(config)
    arrays = arrays_of(config, tensors)
    np.testing.assert_array_equal(
        arrays["params/group_1/ffn/w_up"][1, 3], tensors["model.layers.3.mlp.experts.3.up_proj.weight"].T
    )
    np.testing.assert_array_equal(
        arrays["params/group_0/ffn/w_down"][1], tensors["model.layers.1.mlp.down_proj.weight"].T
    )
    np.testing.assert_array_equal(
        arrays["buffers/group_1/ffn/selection_bias"][0], tensors["model.layers.2.mlp.gate.e_score_correction_bias"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_names_of_the_generator_are_those_of_the_reference(name: str) -> None:
    config = json.loads((ORACLES / name / "config.json").read_text())
    reference = json.loads((ORACLES / name / "oracle.json").read_text())["keys"]
    assert {n: list(shape) for n, shape in hf_folders.shapes_of(config).items()} == reference


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", NAMES)
def test_an_oracle_comes_back_byte_for_byte_and_computes_the_same(name: str, tmp_path: pathlib.Path) -> None:
    middle, back = there_and_back(ORACLES / name, tmp_path)
    assert content(back) == content(ORACLES / name)
    oracle = np.load(ORACLES / name / "oracle.npz")
    found = logits(RunSide(RunTensors(RunFolder(middle))), oracle["input_ids"])
    # The reference's own cached and full computations are up to 2e-5 apart.
    np.testing.assert_allclose(found, oracle["logits"], atol=1e-4)


@st.composite
def models(draw: Any) -> dict[str, Any]:
    """Shapes of all families."""
    number = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    heads, key_heads = draw(st.sampled_from([(4, 4), (4, 2), (6, 2), (4, 1)]))
    common = {
        "vocab_size": number(9, 33),
        "hidden_size": number(1, 5) * 4,
        "num_hidden_layers": number(1, 4),
        "num_attention_heads": heads,
        "tie_word_embeddings": draw(st.booleans()),
    }
    kind = draw(st.sampled_from(["llama", "qwen2", "deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32"]))
    experts = {"n_routed_experts": draw(st.sampled_from([4, 8])), "n_shared_experts": number(1, 2)}
    experts |= {"first_k_dense_replace": number(0, 2), "num_experts_per_tok": number(1, 2)}
    if kind in ("llama", "qwen2"):
        return llama(model_type=kind, num_key_value_heads=key_heads, head_dim=2 * number(1, 4)) | common
    if kind == "deepseek":
        return moe_16b(num_key_value_heads=heads) | common | experts | {"hidden_size": heads * 2 * number(1, 3)}
    latent = {"q_lora_rank": draw(st.sampled_from([None, 5, 12])), "kv_lora_rank": number(3, 20)}
    latent |= {"qk_nope_head_dim": number(1, 9), "qk_rope_head_dim": 2 * number(1, 4), "v_head_dim": number(1, 12)}
    latent |= {"rope_interleave": draw(st.booleans())} if kind == "deepseek_v3" else {}
    if kind == "deepseek_v32":
        latent |= {"q_lora_rank": 12, "index_n_heads": number(1, 3), "index_head_dim": 8 + number(0, 3)}
    groups = draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    latent |= {"n_group": groups[0], "topk_group": groups[1], "num_key_value_heads": heads}
    return deepseek(kind) | common | experts | latent


@settings(max_examples=12, deadline=None)
@given(
    models(),
    st.integers(1, 3),
    st.sampled_from([np.float32, ml_dtypes.bfloat16, np.float16]),
    st.sampled_from(["", "expert=2"]),
)
def test_any_model_comes_back_byte_for_byte(config: dict[str, Any], shards: int, dtype: Any, mesh: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        tensors = random_tensors(config, dtype=dtype)
        if config["tie_word_embeddings"] and shards == 2:  # some files hold the output matrix a second time
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        source = write_folder(folder / "source", config, tensors, shards=shards)
        _, back = there_and_back(source, folder, mesh=mesh)
        assert content(back) == content(source)


def test_tensors_of_several_types_in_one_variable_come_back_as_they_were(tmp_path: pathlib.Path) -> None:
    config = llama()
    tensors = random_tensors(config, dtype=ml_dtypes.bfloat16)
    odd = "model.layers.1.mlp.up_proj.weight"
    tensors[odd] = tensors[odd].astype(np.float16)
    source = write_folder(tmp_path / "source", config, tensors)
    middle, back = there_and_back(source, tmp_path)
    assert content(back) == content(source)
    arrays = RunTensors(RunFolder(middle)).arrays()
    assert arrays["params/group_0/ffn/w_up"].dtype == np.float32  # holds both exactly
    assert arrays["params/group_0/ffn/w_gate"].dtype == ml_dtypes.bfloat16


def test_modules_that_predict_further_tokens_are_the_models(tmp_path: pathlib.Path) -> None:
    config = deepseek(num_nextn_predict_layers=2)
    tensors = random_tensors(config)
    source = write_folder(tmp_path / "source", config, tensors, shards=3)
    middle, back = there_and_back(source, tmp_path)
    assert content(back) == content(source)
    arrays, first = RunTensors(RunFolder(middle)).arrays(), config["num_hidden_layers"]
    joint_2DD = arrays["params/multi_token/w_join"][1]
    x, D = np.random.default_rng(0).normal(size=2 * config["hidden_size"]), config["hidden_size"]
    want = tensors[f"model.layers.{first + 1}.eh_proj.weight"].astype(np.float64) @ x
    np.testing.assert_allclose(np.einsum("pd,pdo->o", x.reshape(2, D), joint_2DD), want, atol=1e-5)
    for ours, theirs in (("embedding_norm", "enorm"), ("hidden_norm", "hnorm"), ("final_norm", "shared_head.norm")):
        scale = arrays[f"params/multi_token/{ours}/scale"][0]
        np.testing.assert_array_equal(scale, tensors[f"model.layers.{first}.{theirs}.weight"])
    up = arrays["params/multi_token/block/ffn/w_up"][1, 3]
    np.testing.assert_array_equal(up, tensors[f"model.layers.{first + 1}.mlp.experts.3.up_proj.weight"].T)


def test_a_module_with_an_embedding_of_its_own_is_refused(tmp_path: pathlib.Path) -> None:
    config = deepseek(num_nextn_predict_layers=1)
    tensors, name = random_tensors(config), f"model.layers.{config['num_hidden_layers']}.embed_tokens.weight"
    tensors[name] = tensors[name] + 1
    source = write_folder(tmp_path / "source", config, tensors)
    with pytest.raises(UserError, match=f"tensor '{name}' differs from 'model.embed_tokens.weight'"):
        run(Request(source, tmp_path / "run", quiet=True))


def test_what_is_not_the_models_is_kept(tmp_path: pathlib.Path) -> None:
    """Of a module without its joint, some layer behind the last one; old tables of angles; other files."""
    config = deepseek(num_nextn_predict_layers=2)
    tensors = random_tensors(config, dtype=ml_dtypes.bfloat16)
    del tensors[f"model.layers.{config['num_hidden_layers']}.eh_proj.weight"]
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.arange(3, dtype=np.float64)
    source = write_folder(tmp_path / "source", config, tensors, shards=3)
    (source / "figures").mkdir()
    (source / "figures" / "a picture %.png").write_bytes(bytes(range(256)))
    (source / "pytorch_model.bin").write_bytes(b"pickled")
    middle, back = there_and_back(source, tmp_path)
    (source / "pytorch_model.bin").unlink()  # the only thing that is left out
    assert content(back) == content(source)
    assert not [name for name in RunTensors(RunFolder(middle)).arrays() if "multi_token" in name]


# ---------------------------------------------------------------- the run


def test_files_come_back_whatever_they_are_called(tmp_path: pathlib.Path) -> None:
    config = llama()
    source = write_folder(tmp_path / "source", config, random_tensors(config))
    names = ("notes: a.md", "a\\b.txt", "tab\t.txt", "日本 語.md", "50%3A.md", ".%2Ea", "sub/.keep", "sub/a")
    for name in (*names, os.fsdecode(b"\xe9\xff")):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(repr(name))
    (source / ".cache").mkdir()
    (source / ".cache" / "a").write_text("hidden folders are left out")
    before = content(source)
    del before[".cache/a"]
    assert content(there_and_back(source, tmp_path)[1]) == before


def test_what_only_training_uses_has_no_name() -> None:
    config = deepseek()
    model = config_from_hf(config)
    dense, experts = model.groups
    ffn = dataclasses.replace(experts.ffn, num_replicas=2, entropy=EntropyConstraint())
    trained = dataclasses.replace(model, groups=(dense, dataclasses.replace(experts, ffn=ffn)))
    assert len(variables_of(trained)) == len(variables_of(model)) + 3
    assert places(trained, config, variables_of(trained)) == places(model, config, variables_of(model))


def test_a_converted_run_loads_like_any_other(tmp_path: pathlib.Path) -> None:
    """With the tokenizer of a run of ours, whose end token has its own name."""
    source = shutil.copytree(ORACLES / "v3", tmp_path / "source")
    home()
    tokenizer = train_tokenizer(["some text"], 256 + 1, end_token="<eos>")
    (source / "tokenizer.json").write_text(tokenizer.to_json())
    (source / "tokenizer_config.json").write_text('{"eos_token": {"content": "<eos>"}}')
    assert run(Request(source, tmp_path / "run", quiet=True)) == 0
    loaded = load_model(RunFolder(tmp_path / "run"))
    assert loaded.step == 0
    assert loaded.tokenizer.special_ids["<eos>"] == loaded.tokenizer.end_id
    assert loaded.params["group_1"]["ffn"]["selection_bias"].shape == (3, 8)
    main_says(["inspect", str(tmp_path / "run")], 0)


def test_a_run_without_a_tokenizer_is_a_model_all_the_same(tmp_path: pathlib.Path) -> None:
    assert run(Request(ORACLES / "llama_mha", tmp_path / "run", quiet=True)) == 0
    model, oracle = dsjax.load(tmp_path / "run"), np.load(ORACLES / "llama_mha" / "oracle.npz")
    assert (model.tokenizer, model.end_ids, model.max_length) == (None, (1,), 256)
    np.testing.assert_allclose(model.logits(oracle["input_ids"]), oracle["logits"], atol=1e-4)
    main_says(["inspect", str(tmp_path / "run")], 0)
    main_says(["generate", str(tmp_path / "run"), "--prompt", "a"], 2)
    with pytest.raises(UserError, match=r"tokenizer file '.*run/tokenizer\.json' does not exist"):
        load_model(RunFolder(tmp_path / "run"))


def test_the_tokenizer_of_a_run_is_its_folders_or_else_its_own(tmp_path: pathlib.Path) -> None:
    """The folder names the end of a text by its id alone; training without a tokenizer there brings one along."""
    source = shutil.copytree(ORACLES / "llama_mha", tmp_path / "source")
    text = train_tokenizer([], 256, ("<a>",), end_token="<eos>").to_json()
    (source / "tokenizer.json").write_text(text)
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    assert run(Request(source, tmp_path / "run", quiet=True)) == 0
    for path in (source, tmp_path / "run"):
        model = dsjax.load(path)
        assert (model.tokenizer.end_id, model.end_ids) == (1, (1, 7))
    files = tmp_path / "run" / "hf" / "files"
    (files / "tokenizer.json").unlink()
    (files / "generation_config.json").write_text('{"eos_token_id": 7}')
    model = dsjax.load(tmp_path / "run")
    assert (model.tokenizer.to_json(), model.end_ids, model.max_length) == (text, (1, 7), 256)
    (tmp_path / "run" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing: it is the tokenizer that checkpoint 0 of"):
        dsjax.load(tmp_path / "run")


def main_says(arguments: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == code
