"""Checkpoints of random weights in Hugging Face's layout, of the shapes that generation is timed on."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

VOCAB, D_MODEL, LAYERS, HEADS, HEAD_DIM, D_FF, CONTEXT = 32_000, 768, 12, 12, 64, 2048, 2048

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": D_FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# DeepSeek-V2-Lite's parts, fewer and narrower: latent attention, one dense layer, softmax router, shared experts.
V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": VOCAB,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 9,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "softmax",
    "q_lora_rank": None,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# The shape of DeepSeek-Coder 1.3B: for the time to the first token.
CODER_1B = LLAMA | {
    "vocab_size": 32_256,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
MODELS = {"llama_100m": LLAMA, "v2_lite_100m": V2_LITE}
SHAPES = MODELS | {"coder_1.3b": CODER_1B}


def write_checkpoint(name: str, folder: pathlib.Path) -> None:
    """config.json, the weights (seed 0) in shards of one layer each, and a small tokenizer."""
    from safetensors.numpy import save_file

    fields, rng, index = SHAPES[name], np.random.default_rng(0), dict[str, str]()
    for number, shapes in enumerate(_shards(fields)):
        file = f"model-{number:05}.safetensors"
        tensors = {}
        for key, shape in shapes.items():
            if len(shape) == 1:
                tensors[key] = np.ones(shape, np.float32)
            else:  # logits differ enough for a greedy choice
                tensors[key] = rng.normal(size=shape, scale=shape[1] ** -0.5).astype(np.float32)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(fields | {"dtype": "float32"}))
    _write_tokenizer(folder)


def _shards(fields: dict[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors: what is around the layers, and each layer."""
    V, D = fields["vocab_size"], fields["hidden_size"]
    around: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not fields["tie_word_embeddings"]:
        around["lm_head.weight"] = (V, D)
    return [around, *(_layer(fields, number) for number in range(fields["num_hidden_layers"]))]


def _layer(fields: dict[str, Any], number: int) -> dict[str, tuple[int, ...]]:
    D, N, name = fields["hidden_size"], fields["num_attention_heads"], f"model.layers.{number}."
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}{norm}_layernorm.weight": (D,) for norm in ("input", "post_attention")
    }
    if fields["model_type"] == "llama":
        width = N * fields["head_dim"]
        shapes |= {f"{name}self_attn.{x}_proj.weight": (width, D) for x in "qkv"}
        shapes[f"{name}self_attn.o_proj.weight"] = (D, width)
    else:
        nope, rope, value = (fields[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        rank = fields["kv_lora_rank"]
        shapes |= {
            f"{name}self_attn.q_proj.weight": (N * (nope + rope), D),
            f"{name}self_attn.kv_a_proj_with_mqa.weight": (rank + rope, D),
            f"{name}self_attn.kv_a_layernorm.weight": (rank,),
            f"{name}self_attn.kv_b_proj.weight": (N * (nope + value), rank),
            f"{name}self_attn.o_proj.weight": (D, N * value),
        }
    if number < fields.get("first_k_dense_replace", fields["num_hidden_layers"]):
        return shapes | _mlp(f"{name}mlp.", D, fields["intermediate_size"])
    F = fields["moe_intermediate_size"]
    shapes[f"{name}mlp.gate.weight"] = (fields["n_routed_experts"], D)
    for expert in range(fields["n_routed_experts"]):
        shapes |= _mlp(f"{name}mlp.experts.{expert}.", D, F)
    return shapes | _mlp(f"{name}mlp.shared_experts.", D, F * fields["n_shared_experts"])


def _mlp(name: str, D: int, F: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}gate_proj.weight": (F, D), f"{name}up_proj.weight": (F, D), f"{name}down_proj.weight": (D, F)}


def _write_tokenizer(folder: pathlib.Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    special = ["<begin>", "<end>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate([*special, *letters])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(special)
    inner.save(str(folder / "tokenizer.json"))
    about = {"bos_token": special[0], "eos_token": special[1], "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def cache_bytes(length: int = 4096) -> dict[str, float]:
    """Bytes of the decode cache a token in bfloat16, at this length, of attention of V2-Lite's width, 27 layers."""
    from dsjax.models.decoder import DecoderConfig, LayerGroup
    from dsjax.nn.attention import AttentionConfig
    from dsjax.nn.latent_attention import LatentAttentionConfig
    from dsjax.nn.masks import Segmented
    from dsjax.nn.mlp import MLPConfig

    kinds: dict[str, Any] = {
        "MHA": AttentionConfig(16, 16, 128),
        "GQA, 4 key/value heads": AttentionConfig(16, 4, 128),
        "MHA, segments of 512 with tails of 64": AttentionConfig(16, 16, 128, segmented=Segmented(512, 64)),
        "MLA": LatentAttentionConfig(num_heads=16, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128),
    }
    shape = {name: DecoderConfig(102_400, 2048, 27, (LayerGroup(MLPConfig(8), kind),)) for name, kind in kinds.items()}
    return {name: config.kv_bytes_per_token(length=length) for name, config in shape.items()}
