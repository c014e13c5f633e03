"""8-bit weights: their values by the definition, taken as bfloat16, or kept so that they come back byte for byte."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hf_folders import Tensors, content, deepseek, in_8_bits, random_tensors, write_folder
from hypothesis import given
from hypothesis import strategies as st

from dsjax.config import UserError
from dsjax.convert import check
from dsjax.convert.command import Request, run
from dsjax.convert.families import config_from_hf
from dsjax.convert.fp8 import dequantize, quantize, scales_for
from dsjax.convert.names import read_arrays
from dsjax.convert.run_tensors import RunTensors
from dsjax.runs import RunFolder
from dsjax.tensor_files import TensorFiles

FP8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
BLOCK = 8  # small, so that small matrices have several; the definition is the same
QUANTIZED = {
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]},
    "torch_dtype": "bfloat16",
}


def by_definition(x: np.ndarray, scale: np.ndarray, block: int) -> np.ndarray:
    """Each number times the scale of its block, one by one, in float32; then rounded to bfloat16."""
    out = np.empty(x.shape, np.float32)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[i, j] = np.float32(x[i, j]) * scale[i // block, j // block]
    return out.astype(BF16)


def model(kind: str = "deepseek_v3", **fields: Any) -> tuple[dict[str, Any], Tensors]:
    config = deepseek(kind, **(QUANTIZED | fields))
    return config, in_8_bits(random_tensors(config, dtype=BF16), BLOCK)


def convert(source: pathlib.Path, target: pathlib.Path, **options: Any) -> pathlib.Path:
    assert run(Request(source, target, quiet=True, **options)) == 0
    return target


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (9, 17), (24, 7), (16, 40)])
def test_values_are_numbers_times_the_scale_of_their_block(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, shape, np.uint8).view(FP8)
    scale = rng.uniform(1e-4, 3, (-(-shape[0] // 8), -(-shape[1] // 8))).astype(np.float32)
    found, expected = dequantize(x, scale, (8, 8)), by_definition(x, scale, 8)
    np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))


def test_blocks_are_of_128_by_128_unless_the_config_says_otherwise() -> None:
    x, scale = np.ones((130, 129), FP8), np.array([[1, 2], [3, 4]], np.float32)
    found = dequantize(x, scale)
    assert [float(found[i, j]) for i, j in ((127, 127), (127, 128), (128, 127), (129, 128))] == [1, 2, 3, 4]


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_every_value_is_found_again_from_its_bfloat16(scale: float) -> None:
    bits = np.arange(256, dtype=np.uint8)
    x = bits[np.isfinite(bits.view(FP8).astype(np.float32))].view(FP8)[None]
    scales = np.full((1, 2), scale, np.float32)
    assert quantize(dequantize(x, scales), scales).tobytes() == x.tobytes()


def test_new_scales_bring_the_largest_number_of_each_block_to_448() -> None:
    x = np.random.default_rng(0).standard_normal((10, 19)).astype(BF16)
    x[8:, 16:] = 0
    scale = scales_for(x, (8, 8))
    for i, j in ((0, 0), (0, 2), (1, 1)):
        part = x[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].astype(np.float32)
        assert scale[i, j] == np.float32(np.abs(part).max() / np.float32(448))
    assert scale[1, 2] == 1
    powers = scales_for(x, (8, 8), powers_of_two=True)
    assert np.all(np.log2(powers) == np.ceil(np.log2(scale)))  # the next above: nothing is more than 448
    back = dequantize(quantize(x, scale, (8, 8)), scale, (8, 8)).astype(np.float32)
    # 3 bits behind the point: half of the last is 1/16 of a number, or of the smallest normal one, 2**-6 of a scale.
    bound = np.maximum(np.abs(x.astype(np.float32)), scale.max() * 2.0**-6) / 16 * 1.01  # bfloat16 rounds once more
    assert np.all(np.abs(back - x.astype(np.float32)) <= bound)


# ---------------------------------------------------------------- checkpoints


def test_weights_are_taken_in_bfloat16(tmp_path: pathlib.Path) -> None:
    config, tensors = model()
    source = write_folder(tmp_path / "source", config, tensors, shards=2)  # scales in other files than their weights
    arrays = read_arrays(TensorFiles(source), config, config_from_hf(config))
    name = "model.layers.2.mlp.experts.1.up_proj.weight"
    expected = by_definition(tensors[name], tensors[name + "_scale_inv"], BLOCK)
    found = RunTensors(RunFolder(convert(source, tmp_path / "run"))).arrays()
    for ours in (arrays, found):
        assert ours["params/group_1/ffn/w_up"].dtype == BF16
        np.testing.assert_array_equal(ours["params/group_1/ffn/w_up"][1, 1].view(np.uint16), expected.T.view(np.uint16))


def test_a_run_without_scales_gives_a_folder_in_bfloat16(tmp_path: pathlib.Path) -> None:
    config, tensors = model(num_nextn_predict_layers=1)
    source = write_folder(tmp_path / "source", config, tensors, shards=2)
    back = convert(convert(source, tmp_path / "run"), tmp_path / "back")
    files, before = TensorFiles(back), TensorFiles(source)
    assert set(files) == {name for name in tensors if not name.endswith("_scale_inv")}
    for name in files:  # layers of multi-token prediction, too
        if name + "_scale_inv" in before:
            expected = by_definition(before[name], before[name + "_scale_inv"], BLOCK)
            assert files[name].dtype == BF16
            assert files[name].tobytes() == expected.tobytes()
        else:
            assert files[name].tobytes() == before[name].tobytes()
    said = json.loads((back / "config.json").read_text())
    assert said == {name: value for name, value in config.items() if name != "quantization_config"}
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(files)
    assert index["metadata"]["total_size"] == sum(files[name].nbytes for name in files)


@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v32"])
def test_kept_weights_come_back_byte_for_byte(
    kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, tensors = model(kind, num_nextn_predict_layers=1)
    eight_bit = [name for name in tensors if "indexer" in name and tensors[name].dtype == FP8]
    assert len(eight_bit) == (8 if kind == "deepseek_v32" else 0)  # two matrices of each layer, the module's included
    source = write_folder(tmp_path / "source", config, tensors, shards=3)
    middle = convert(source, tmp_path / "run", keep_fp8=True)
    assert content(convert(middle, tmp_path / "back")) == content(source)
    monkeypatch.setattr(check, "memory_bytes", lambda: 1000)
    assert run(Request(source, middle, check=True, quiet=True)) == 0
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"tensors: (\d+) compared, [\d,]+ numbers; \1 equal to the bit", said[2])
    assert said[3] == "logits: not compared: a model takes 0 GB, this machine has 0 GB"


def test_values_that_bfloat16_loses_are_refused_when_they_are_to_be_kept(tmp_path: pathlib.Path) -> None:
    config, tensors = model()
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name + "_scale_inv"][0, 0] = 0
    source = write_folder(tmp_path / "source", config, tensors)
    with pytest.raises(UserError, match=rf"8-bit values of tensor '{name}' can not be found again from bfloat16"):
        run(Request(source, tmp_path / "kept", keep_fp8=True, quiet=True))
    convert(source, tmp_path / "run")  # the control: as bfloat16 they are what they are


NAME = "model.layers.1.self_attn.kv_b_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({NAME + "_scale_inv": None}, rf"tensor '{NAME}' has type float8_e4m3fn, but there is no '{NAME}_scale_inv'"),
        (
            {NAME + "_scale_inv": np.ones((1, 2), np.float32)},
            rf"'{NAME}_scale_inv' is float32\[1, 2\]; .* float32\[8, 2\]",
        ),
        ({NAME + "_scale_inv": np.ones((8, 2), BF16)}, rf"'{NAME}_scale_inv' is bfloat16\[8, 2\]; .* float32\[8, 2\]"),
        ({NAME: np.ones((64, 16), BF16)}, rf"tensor '{NAME}_scale_inv' is unknown"),
    ],
    ids=["no scale", "shape of a scale", "type of a scale", "a scale of nothing"],
)
def test_a_scale_that_does_not_fit_is_named(change: dict[str, Any], said: str, tmp_path: pathlib.Path) -> None:
    config, tensors = model()
    tensors = {name: x for name, x in (tensors | change).items() if x is not None}
    source = write_folder(tmp_path / "source", config, tensors)
    with pytest.raises(UserError, match=said):
        run(Request(source, tmp_path / "run", quiet=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"quant_method": "awq", "bits": 4}, "quantization_config.quant_method is 'awq'; weights are plain or 'fp8'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\]; it must be two numbers"),
        ({"quant_method": "fp8", "scale_fmt": "e5m2"}, "quantization_config.scale_fmt is 'e5m2'; scales are float or"),
        ("int8", "quantization_config.quant_method is 'int8'"),
    ],
)
def test_other_ways_of_quantizing_are_refused(field: Any, said: str, tmp_path: pathlib.Path) -> None:
    config, tensors = model(quantization_config=field)
    with pytest.raises(UserError, match=said):
        run(Request(write_folder(tmp_path / "source", config, tensors), tmp_path / "run", quiet=True))
