"""Random models in Hugging Face's layout, named and shaped by its own model code, not by ours."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from dsjax.tensor_files import DTYPES, INDEX, SINGLE

ORACLES = pathlib.Path(__file__).parent / "oracles"
Tensors = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]
SIGMOID = ("deepseek_v3", "deepseek_v32")  # their routers


def llama(**fields: Any) -> dict[str, Any]:
    """config.json of a small model."""
    return {
        "model_type": "llama",
        "vocab_size": 24,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "float32",
    } | fields


def deepseek(kind: str = "deepseek_v3", **fields: Any) -> dict[str, Any]:
    """The same with latent attention and experts."""
    config = llama(model_type=kind) | {
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 10,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 14,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 10,
        "routed_scaling_factor": 1.5,
        "norm_topk_prob": kind in SIGMOID,
        "scoring_func": "sigmoid" if kind in SIGMOID else "softmax",
        "topk_method": "noaux_tc" if kind in SIGMOID else "group_limited_greedy",
    }
    del config["head_dim"]
    if kind == "deepseek_v32":
        config |= {"index_n_heads": 3, "index_head_dim": 8, "index_topk": 5}
    return config | fields


def moe_16b(**fields: Any) -> dict[str, Any]:
    """The same with grouped-query attention and experts."""
    config = deepseek("deepseek", topk_method="greedy", n_group=None, topk_group=None)
    for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        del config[name]
    return config | fields


def _attention(c: dict[str, Any]) -> Shapes:
    D, N = c["hidden_size"], c["num_attention_heads"]
    if "kv_lora_rank" not in c:
        H, K = c.get("head_dim") or D // N, c["num_key_value_heads"]
        shapes: Shapes = {"q_proj.weight": (N * H, D), "k_proj.weight": (K * H, D), "v_proj.weight": (K * H, D)}
        if c["model_type"] == "qwen2":
            shapes |= {"q_proj.bias": (N * H,), "k_proj.bias": (K * H,), "v_proj.bias": (K * H,)}
        return shapes | {"o_proj.weight": (D, N * H)}
    R, nope, rope, v = (c[f"{n}"] for n in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    if (Q := c["q_lora_rank"]) is None:
        shapes = {"q_proj.weight": (N * (nope + rope), D)}
    else:
        shapes = {"q_a_proj.weight": (Q, D), "q_a_layernorm.weight": (Q,), "q_b_proj.weight": (N * (nope + rope), Q)}
    shapes |= {"kv_a_proj_with_mqa.weight": (R + rope, D), "kv_a_layernorm.weight": (R,)}
    if "index_topk" in c:
        h, d = c["index_n_heads"], c["index_head_dim"]
        shapes |= {"indexer.wq_b.weight": (h * d, Q), "indexer.wk.weight": (d, D), "indexer.k_norm.weight": (d,)}
        shapes |= {"indexer.k_norm.bias": (d,), "indexer.weights_proj.weight": (h, D)}
    return shapes | {"kv_b_proj.weight": (N * (nope + v), R), "o_proj.weight": (D, N * v)}


def _mlp(D: int, F: int) -> Shapes:
    return {"gate_proj.weight": (F, D), "up_proj.weight": (F, D), "down_proj.weight": (D, F)}


def _feed_forward(c: dict[str, Any], layer: int) -> Shapes:
    D, E = c["hidden_size"], c.get("n_routed_experts")
    if E is None or layer < c["first_k_dense_replace"]:
        return _mlp(D, c["intermediate_size"])
    F, shapes = c["moe_intermediate_size"], {"gate.weight": (E, D)}
    if c["model_type"] in SIGMOID:
        shapes["gate.e_score_correction_bias"] = (E,)
    for expert in range(E):
        shapes |= {f"experts.{expert}.{name}": shape for name, shape in _mlp(D, F).items()}
    if shared := c["n_shared_experts"]:
        shapes |= {f"shared_experts.{name}": shape for name, shape in _mlp(D, F * shared).items()}
    return shapes


def _layer(c: dict[str, Any], layer: int) -> Shapes:
    norms = {"input_layernorm.weight": (c["hidden_size"],), "post_attention_layernorm.weight": (c["hidden_size"],)}
    attention = {f"self_attn.{name}": shape for name, shape in _attention(c).items()}
    ffn = {f"mlp.{name}": shape for name, shape in _feed_forward(c, layer).items()}
    return {f"model.layers.{layer}.{name}": shape for name, shape in (norms | attention | ffn).items()}


def shapes_of(c: dict[str, Any]) -> Shapes:
    """Every tensor of a model with its shape."""
    V, D, L = c["vocab_size"], c["hidden_size"], c["num_hidden_layers"]
    shapes: Shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not c.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (V, D)
    for layer in range(L):
        shapes |= _layer(c, layer)
    for layer in range(L, L + c.get("num_nextn_predict_layers", 0)):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}enorm.weight": (D,), f"{prefix}hnorm.weight": (D,), f"{prefix}eh_proj.weight": (D, 2 * D)}
        shapes |= {f"{prefix}embed_tokens.weight": (V, D), f"{prefix}shared_head.head.weight": (V, D)}
        shapes |= {f"{prefix}shared_head.norm.weight": (D,)} | _layer(c, layer)
    return shapes


def random_tensors(c: dict[str, Any], *, dtype: Any = np.float32, seed: int = 0) -> Tensors:
    """Every tensor of a model with random numbers; what biases the choice of experts is float32, as it always is."""
    rng, out = np.random.default_rng(seed), {}
    for name, shape in shapes_of(c).items():
        kind = np.float32 if "bias" in name and "gate" in name else dtype
        out[name] = (rng.standard_normal(shape) / max(shape[-1], 4) ** 0.5).astype(kind)
    repeated = {"embed_tokens": "model.embed_tokens.weight", "head": "lm_head.weight"}  # by modules of prediction
    for name in out:
        of = repeated.get(name.split(".")[-2], "") if name.startswith("model.layers.") else ""
        out[name] = out[of if of in out else "model.embed_tokens.weight"] if of else out[name]
    return out


PLAIN = ("gate.weight", "eh_proj.weight", "embed_tokens.weight", "shared_head.head.weight", "weights_proj.weight")


def in_8_bits(tensors: Tensors, block: int = 128) -> Tensors:
    """As DeepSeek-V3 is stored: the matrices of layers but PLAIN in float8_e4m3fn, with scales of their blocks.

    Written down number by number: scale = largest / 448, value = number / scale.
    """
    out: Tensors = {}
    for name, x in tensors.items():
        if x.ndim < 2 or ".layers." not in name or name.endswith(PLAIN):
            out[name] = x
            continue
        rows, columns = -(-x.shape[0] // block), -(-x.shape[1] // block)
        scale, values = np.empty((rows, columns), np.float32), np.empty(x.shape, ml_dtypes.float8_e4m3fn)
        for i in range(rows):
            for j in range(columns):
                part = np.s_[i * block : (i + 1) * block, j * block : (j + 1) * block]
                scale[i, j] = np.abs(x[part].astype(np.float32)).max() / 448
                values[part] = (x[part].astype(np.float32) / scale[i, j]).astype(ml_dtypes.float8_e4m3fn)
        out |= {name: values, f"{name}_scale_inv": scale}
    return out


def save_tensors(path: pathlib.Path, tensors: Tensors, metadata: Any = None, *, padding: int = 3) -> None:
    """Writes a .safetensors file by the format's definition, with a header such as no library of ours would write."""
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header, offset = {} if metadata is None else {"__metadata__": metadata}, 0
    for name, x in tensors.items():
        header[name] = {"shape": x.shape, "data_offsets": [offset, offset + x.nbytes], "dtype": names[x.dtype]}
        offset += x.nbytes
    text = json.dumps(header, indent=1).encode() + b" " * padding
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(x.tobytes() for x in tensors.values()))


def write_folder(folder: pathlib.Path, config: dict[str, Any], tensors: Tensors, *, shards: int = 1) -> pathlib.Path:
    """A model's folder, its tensors in turn in so many files, in the reverse of their order."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=3))
    (folder / "generation_config.json").write_text('{"eos_token_id":  1}')
    (folder / "README.md").write_text("# a model\n")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    if shards == 1:
        save_tensors(folder / SINGLE, dict(reversed(tensors.items())), {"format": "pt"})
        return folder
    where = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        names = list(tensors)[number::shards][::-1]
        save_tensors(folder / file, {name: tensors[name] for name in names}, padding=number)
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def content(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
