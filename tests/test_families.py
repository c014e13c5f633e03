"""config.json <-> the decoder's config; and DeepSeek-MoE, which transformers lacks, against its equations in NumPy."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from hf_folders import deepseek
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import dsjax
from dsjax.config import UserError
from dsjax.convert.families import config_from_hf, hf_config
from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.history import CopyConfig
from dsjax.nn.indexer import IndexerConfig
from dsjax.nn.latent_attention import LatentAttentionConfig
from dsjax.nn.masks import Segmented
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.nn.rope import LinearScaling, Llama3Scaling, YarnScaling

ORACLES = pathlib.Path(__file__).parent / "oracles"
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MOE_16B = LLAMA | {
    "model_type": "deepseek",
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 6,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "rope_theta": 10000,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}
V3 = json.loads((ORACLES / "v3_yarn" / "config.json").read_text())


# ---------------------------------------------------------------- DeepSeek-MoE


def random_folder(folder: pathlib.Path, seed: int) -> dict[str, np.ndarray]:
    """A folder in the layout of DeepSeek-MoE-16B's, of random weights."""
    rng, D = np.random.default_rng(seed), 16

    def matrix(outputs: int, inputs: int) -> np.ndarray:
        return (rng.normal(size=(outputs, inputs)) * 1.2 * inputs**-0.5).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.2 * rng.normal(size=D)).astype(np.float32)

    def mlp(prefix: str, inner: int) -> dict[str, np.ndarray]:
        sizes = {"gate_proj": (inner, D), "up_proj": (inner, D), "down_proj": (D, inner)}
        return {f"{prefix}.{name}.weight": matrix(*size) for name, size in sizes.items()}

    tensors = {
        "model.embed_tokens.weight": matrix(32, D) * 4,
        "model.norm.weight": norm(),
        "lm_head.weight": matrix(32, D),
    }
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        for name in ("q", "k", "v", "o"):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = matrix(D, D)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = norm()
        if layer == 0:
            tensors |= mlp(f"{prefix}.mlp", 24)
            continue
        tensors[f"{prefix}.mlp.gate.weight"] = matrix(8, D) * 2
        tensors |= mlp(f"{prefix}.mlp.shared_experts", 12)
        for expert in range(8):
            tensors |= mlp(f"{prefix}.mlp.experts.{expert}", 6)
    (folder / "config.json").write_text(json.dumps(MOE_16B))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def moe_by_the_paper(tensors: dict[str, np.ndarray], ids_T: np.ndarray) -> np.ndarray:
    """Logits by the equations of arXiv 2401.06066, section 3, position by position, float64."""
    w = {name: x.astype(np.float64) for name, x in tensors.items()}
    N, H = 4, 4

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + 1e-6) * w[name]

    def mlp(prefix: str, x: np.ndarray) -> np.ndarray:
        gate, up = (w[f"{prefix}.{name}_proj.weight"] @ x for name in ("gate", "up"))
        return w[f"{prefix}.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)

    def rotate(x: np.ndarray, t: int) -> np.ndarray:
        angles = t * 10000.0 ** (-np.arange(H // 2) / (H // 2))
        a, b = x[: H // 2], x[H // 2 :]
        return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)])

    x_TD = w["model.embed_tokens.weight"][ids_T]
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        h = np.stack([norm(x, f"{prefix}.input_layernorm.weight") for x in x_TD])
        q, k, v = ((h @ w[f"{prefix}.self_attn.{n}_proj.weight"].T).reshape(-1, N, H) for n in "qkv")
        for t in range(len(x_TD)):
            heads = []
            for n in range(N):
                scores = np.array([rotate(q[t, n], t) @ rotate(k[s, n], s) for s in range(t + 1)]) / H**0.5
                p = np.exp(scores - scores.max())
                heads.append((p / p.sum()) @ v[: t + 1, n])
            x_TD[t] = x_TD[t] + w[f"{prefix}.self_attn.o_proj.weight"] @ np.concatenate(heads)
        for t in range(len(x_TD)):
            u = norm(x_TD[t], f"{prefix}.post_attention_layernorm.weight")
            if layer == 0:
                x_TD[t] = x_TD[t] + mlp(f"{prefix}.mlp", u)
                continue
            scores = np.exp(w[f"{prefix}.mlp.gate.weight"] @ u)
            scores = scores / scores.sum()
            y = mlp(f"{prefix}.mlp.shared_experts", u)
            for expert in np.argsort(-scores)[:3]:
                y = y + scores[expert] * mlp(f"{prefix}.mlp.experts.{expert}", u)
            x_TD[t] = x_TD[t] + y
    return np.stack([w["lm_head.weight"] @ norm(x, "model.norm.weight") for x in x_TD])


def test_deepseek_moe_is_the_papers(tmp_path: pathlib.Path) -> None:
    tensors = random_folder(tmp_path, 0)
    model, ids_T = dsjax.load(tmp_path), np.random.default_rng(1).integers(0, 32, 12)
    want = moe_by_the_paper(tensors, ids_T)
    np.testing.assert_allclose(model.logits(ids_T[None])[0], want, atol=5e-5)  # float32, logits of about 1


# ---------------------------------------------------------------- both ways


ROPES = [
    {},
    {"rope_theta": 5e5},
    {"rope_scaling": {"type": "linear", "factor": 4}},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}},
    {"rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 0.707,
                      "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1}, "rope_theta": 10000},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.2, "truncate": False},
     "max_position_embeddings": 64},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192}},
]  # fmt: skip


@st.composite
def hf_configs(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["llama", "qwen2", "deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32"]))
    found = LLAMA | {"model_type": kind, "num_key_value_heads": 4, "tie_word_embeddings": draw(st.booleans())}
    found |= draw(st.sampled_from(ROPES)) | {"rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6]))}
    if kind in ("llama", "qwen2"):
        return found | {
            "num_key_value_heads": draw(st.sampled_from([1, 2, 4])),
            "head_dim": draw(st.sampled_from([4, 6])),
        }
    groups = draw(st.sampled_from([1, 2, 4]))
    found |= {
        "n_routed_experts": draw(st.sampled_from([8, 16])),
        "num_experts_per_tok": 2,
        "n_shared_experts": draw(st.sampled_from([None, 1, 2])),
        "moe_intermediate_size": 6,
        "first_k_dense_replace": draw(st.sampled_from([0, 1, 2])),
    }
    if kind == "deepseek":
        return found | {"norm_topk_prob": draw(st.booleans())}
    found |= {"kv_lora_rank": 6, "q_lora_rank": draw(st.sampled_from([None, 5])), "qk_nope_head_dim": 3}
    found |= {"qk_rope_head_dim": 4, "v_head_dim": 5, "n_group": groups, "topk_group": max(groups // 2, 1)}
    found |= {"routed_scaling_factor": draw(st.sampled_from([1.0, 2.5]))}
    if kind == "deepseek_v2":
        limited = "group_limited_greedy" if groups > 1 else "greedy"
        return found | {"topk_method": limited, "norm_topk_prob": False}
    if kind == "deepseek_v32":
        found |= {"q_lora_rank": 5, "index_n_heads": draw(st.sampled_from([1, 3])), "index_head_dim": 6}
        found |= {"index_topk": draw(st.sampled_from([4, 2048]))}
    return found | {"norm_topk_prob": draw(st.booleans())}


@settings(max_examples=200, deadline=None)
@given(hf_configs())
def test_a_config_comes_back_as_it_was(hf: dict[str, Any]) -> None:
    config = config_from_hf(hf)
    again = hf_config(config, max_length=hf.get("max_position_embeddings", 2048), end_ids=(1,))
    dense = all(isinstance(group.ffn, MLPConfig) for group in config.groups)
    assert again["model_type"] == (hf["model_type"] if not dense or hf["model_type"] in ("llama", "qwen2") else
                                   "deepseek_v32" if "index_topk" in hf else
                                   "deepseek_v3" if "kv_lora_rank" in hf else "llama")  # fmt: skip
    assert config_from_hf(json.loads(json.dumps(again))) == config


V2_LITE = {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "n_shared_experts": 2,
    "n_routed_experts": 64, "routed_scaling_factor": 1.0, "kv_lora_rank": 512, "q_lora_rank": None,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "topk_method": "greedy", "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "norm_topk_prob": False,
}  # fmt: skip
V3_671B = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "n_shared_experts": 1,
    "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "topk_method": "noaux_tc", "n_group": 8,
    "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True,
    "scoring_func": "sigmoid",
}  # fmt: skip


# An indexer of 13.97 million parameters in each of 61 layers.
V32 = V3_671B | {"model_type": "deepseek_v32", "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}


@pytest.mark.parametrize(
    ("hf", "total", "active"),
    [(V2_LITE, 15.7e9, 2.66e9), (V3_671B, 671e9, 37.6e9), (V32, 671e9 + 0.852e9, 37.6e9 + 0.852e9)],
)
def test_published_shapes_have_the_published_numbers_of_parameters(hf: dict, total: float, active: float) -> None:
    """DeepSeek states 15.7B, and 671B with 37B active; V2-Lite's 2.4B leave the input embedding out."""
    config = config_from_hf(hf)
    assert config.num_params() == pytest.approx(total, rel=0.005)
    assert config.num_active_params() == pytest.approx(active, rel=0.01)


def test_an_indexer_adds_its_matrices_and_its_norm_to_every_layer() -> None:
    more = config_from_hf(V32).num_params() - config_from_hf(V3_671B).num_params()
    assert more == 61 * (1536 * 64 * 128 + 7168 * (128 + 64) + 2 * 128)


@pytest.mark.parametrize(
    ("hf", "scaling"),
    [
        (ROPES[2], LinearScaling(4.0)),
        (ROPES[3], LinearScaling(4.0)),
        (ROPES[4], YarnScaling(40.0, 4096, 32.0, 1.0, 0.707, 0.707)),
        (ROPES[5], YarnScaling(4.0, 64, fixed_amplitude=1.2, whole_channels=False)),
        (ROPES[6], Llama3Scaling(8.0, 1.0, 4.0, 8192)),
        # Beside the others it goes before the one among them: so transformers 5.24 computes its frequencies.
        (ROPES[6] | {"original_max_position_embeddings": 512}, Llama3Scaling(8.0, 1.0, 4.0, 512)),
        (ROPES[4] | {"original_max_position_embeddings": 512}, YarnScaling(40.0, 512, 32.0, 1.0, 0.707, 0.707)),
        (ROPES[3] | ROPES[6], Llama3Scaling(8.0, 1.0, 4.0, 8192)),  # transformers takes the older one of both
    ],
)
def test_ropes_are_read_in_both_spellings(hf: dict[str, Any], scaling: Any) -> None:
    assert config_from_hf(LLAMA | hf).groups[0].attention.rope_scaling == scaling


@pytest.mark.parametrize("hf", [V3_671B, V32], ids=["v3", "v32"])
def test_a_field_that_is_not_there_is_what_transformers_takes_it_for(hf: dict[str, Any]) -> None:
    """Its configs of 5.24, whose routers have 8 groups, of which 4 are chosen, and weights times 2.5."""
    names = ("n_group", "topk_group", "routed_scaling_factor", "q_lora_rank", "n_shared_experts")
    left_out = {name: value for name, value in hf.items() if name not in names}
    assert config_from_hf(left_out) == config_from_hf(hf)
    experts = config_from_hf(left_out | dict.fromkeys(names[:3])).groups[1].ffn  # null is no number
    assert isinstance(experts, MoEConfig)
    assert (experts.num_groups, experts.top_groups, experts.routed_scale) == (1, 1, 1.0)


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "deepseek_v32"])
def test_no_experts_are_written_as_numbers(kind: str) -> None:
    """transformers takes no null for them, and loads both: 5.24 computed the logits of dsjax to 2e-7."""
    source = deepseek(kind, first_k_dense_replace=3)
    dense = hf_config(config_from_hf(source), max_length=64)
    assert (dense["n_routed_experts"], dense["first_k_dense_replace"]) == (1, 3)
    without = config_from_hf(source | {"first_k_dense_replace": 1, "n_shared_experts": 0})
    again = hf_config(without, max_length=64)
    assert again["n_shared_experts"] == 0
    assert config_from_hf(again) == without == config_from_hf(again | {"n_shared_experts": None})


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("hf", "sentence"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; dsjax converts llama, qwen2"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]; dsjax converts llama, qwen2"),
        (LLAMA | {"vocab_size": None}, "has no vocab_size; a llama model needs it"),
        (LLAMA | {"hidden_size": "16"}, "hidden_size is '16'; it must be a whole number"),
        (LLAMA | {"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5; it must be a whole number"),
        (LLAMA | {"num_hidden_layers": float("nan")}, "num_hidden_layers is nan; it must be a whole number"),
        (LLAMA | {"vocab_size": float("inf")}, "vocab_size is inf; it must be a whole number"),
        (LLAMA | {"rms_norm_eps": 10**400}, "rms_norm_eps is 10+; it must be a number"),
        (LLAMA | {"num_attention_heads": 0}, "num_heads is 0; it must be an integer >= 1"),
        (LLAMA | {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 0}}, "original_length is 0"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act is 'gelu'; dsjax has 'silu'"),
        (LLAMA | {"attention_bias": True}, "attention_bias is True; dsjax has False"),
        (LLAMA | {"num_key_value_heads": 3}, "num_kv_heads is 3; it must divide"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "has no factor"),
        (LLAMA | {"rope_parameters": {"full": {"rope_type": "default"}}}, "differ from layer to layer"),
        (V3 | {"scoring_func": "softmax"}, "scoring_func is 'softmax'; dsjax has 'sigmoid'"),
        (V3 | {"n_group": 3}, "num_groups is 3; it must divide num_experts"),
        (V3 | {"moe_layer_freq": 2}, "moe_layer_freq is 2; dsjax has 1"),
        (V32 | {"rope_interleave": False}, "rope_interleave is False; dsjax has True"),
        (V32 | {"mlp_layer_types": ["sparse"] * 61}, r"mlp_layer_types is \['sparse'"),
        (V32 | {"layer_types": ["full_attention"] * 61}, r"layer_types is \['full_attention'"),
        (V32 | {"q_lora_rank": None}, "q_rank is none; an indexer makes its queries"),
        (MOE_16B | {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
    ],
)
def test_what_the_decoder_has_not_is_named(hf: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        config_from_hf(hf)


def with_layers(ffn: Any, attention: Any, **more: Any) -> DecoderConfig:
    return DecoderConfig(32, 16, 1, (LayerGroup(ffn, attention),), **more)


DENSE, FULL, LATENT = MLPConfig(8), AttentionConfig(), LatentAttentionConfig()
SOFTMAX = MoEConfig(normalize_weights=False)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (with_layers(DENSE, FULL, copy=CopyConfig()), "a copy head"),
        (with_layers(DENSE, dataclasses.replace(FULL, segmented=Segmented())), "segmented attention"),
        (with_layers(DENSE, dataclasses.replace(FULL, window=4)), "a window"),
        (with_layers(DENSE, dataclasses.replace(FULL, conv_taps=2)), "convolutions"),
        (with_layers(DENSE, dataclasses.replace(FULL, qk_norm=True)), "normalised queries and keys"),
        (with_layers(dataclasses.replace(SOFTMAX, scoring="sigmoid"), FULL), "a sigmoid router"),
        (with_layers(dataclasses.replace(SOFTMAX, num_groups=2), FULL), "with groups of experts"),
        (with_layers(MoEConfig(), LATENT), "normalised weights of a softmax router"),
        (with_layers(MoEConfig(scoring="sigmoid"), LATENT), "without a selection bias"),
        (with_layers(SOFTMAX, dataclasses.replace(LATENT, q_rank=8, indexer=IndexerConfig())), "an indexer beside"),
        (with_layers(DENSE, dataclasses.replace(LATENT, q_rank=8, indexer=IndexerConfig(warm_up=True))), "warming up"),
        (
            DecoderConfig(32, 16, 2, (LayerGroup(SOFTMAX, FULL, num_layers=1), LayerGroup(DENSE, FULL))),
            "more than dense layers and then layers of experts",
        ),
        (
            DecoderConfig(32, 16, 2, (LayerGroup(DENSE, FULL, num_layers=1), LayerGroup(SOFTMAX, LATENT))),
            "several kinds of attention",
        ),
    ],
)
def test_what_no_family_has_is_named(config: DecoderConfig, sentence: str) -> None:
    with pytest.raises(UserError, match=f"the model has .*{sentence}"):
        hf_config(config, max_length=64)
