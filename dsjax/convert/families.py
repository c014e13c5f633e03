"""config.json of a Hugging Face folder <-> the decoder's config.

The families: ``llama`` (DeepSeek-LLM, Coder, Math, R1-Distill-Llama), ``qwen2`` (R1-Distill-Qwen), ``deepseek``
(DeepSeek-MoE), ``deepseek_v2`` (V2, V2-Lite), ``deepseek_v3`` (V3, R1) and ``deepseek_v32`` (V3.2). What a config says
beyond what the decoder can do is refused by name: nothing is dropped in silence that would change a logit.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Container, Mapping
from typing import Any

from dsjax.config import UserError, validate
from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.models.multi_token import MultiTokenConfig
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.indexer import IndexerConfig
from dsjax.nn.latent_attention import LatentAttentionConfig, only_indexers_learn
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.nn.rope import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
}
LATENT, SIGMOID = ("deepseek_v2", "deepseek_v3", "deepseek_v32"), ("deepseek_v3", "deepseek_v32")  # attention; routers
# Fields of which the decoder has one value only.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, None),
    "moe_layer_freq": (1, None),
    "ep_size": (1, None),
    "pretraining_tp": (1, None),  # what else it may be, changes the order of sums alone
}
# What transformers takes for a field that is not there; one that is null is another matter.
OF_V3 = {"q_lora_rank": 1536, "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}
ABSENT: dict[Any, dict[str, Any]] = {
    "qwen2": {"max_position_embeddings": 32768},
    "deepseek_v2": {"q_lora_rank": 1536, "n_shared_experts": 2},
    "deepseek_v3": OF_V3 | {"max_position_embeddings": 4096},
    "deepseek_v32": OF_V3 | {"max_position_embeddings": 163840},
}


class _Fields:
    """The fields of a config.json, each checked when it is read."""

    def __init__(self, fields: Mapping[str, Any]):
        self.fields = {**ABSENT.get(fields["model_type"], {}), **fields}

    def number(self, name: str, default: Any = ..., kind: type = int) -> Any:
        """A number, of ``kind``; ``default`` where there is none or it is null.

        Raises:
            UserError: it is missing, or something else.
        """
        value = self.fields.get(name)
        if value is None:
            if default is ...:
                raise UserError(f"config.json has no {name}; a {self.fields.get('model_type')} model needs it")
            return default
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        number = number and abs(value) <= sys.float_info.max  # NaN is not either
        if not number or (kind is int and value != int(value)):
            raise UserError(f"config.json: {name} is {value!r}; it must be {'a whole ' * (kind is int) or 'a '}number")
        return kind(value)

    def one_of(self, name: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        """A value out of a list; ``default`` where there is none.

        Raises:
            UserError: it is another one.
        """
        value = self.fields.get(name, default)
        if value not in allowed:
            said = ", ".join(repr(x) for x in allowed if x is not None)
            raise UserError(f"config.json: {name} is {value!r}; dsjax has {said}")
        return value


def config_from_hf(hf: Mapping[str, Any], tensors: Container[str] = ()) -> DecoderConfig:
    """The model that a config.json describes.

    Args:
        hf: the fields of config.json.
        tensors: names of the tensors beside it. Modules of multi-token prediction are the model's if they are there:
            many folders say ``num_nextn_predict_layers`` and have none.

    Raises:
        UserError: names the field that is missing or has a value which the decoder can not express.
    """
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UserError(f"config.json: model_type is {kind!r}; dsjax converts {', '.join(ARCHITECTURES)}")
    fields = _Fields(hf)
    for name, allowed in FIXED.items():
        if name in hf and name != "pretraining_tp":
            fields.one_of(name, allowed)
    attention = _latent_attention(fields) if kind in LATENT else _grouped_attention(fields)
    num_layers = fields.number("num_hidden_layers")
    dense = LayerGroup(MLPConfig(fields.number("intermediate_size")), attention)
    num_dense = num_layers
    if kind in ("deepseek", *LATENT) and hf.get("n_routed_experts") is not None:
        num_dense = min(fields.number("first_k_dense_replace", 3 if kind in SIGMOID else 0), num_layers)
    groups = []
    if num_dense:
        groups.append(dataclasses.replace(dense, num_layers=num_dense))
    if num_dense < num_layers:
        groups.append(LayerGroup(_experts(fields), attention, num_layers=num_layers - num_dense))
    config = DecoderConfig(
        vocab_size=fields.number("vocab_size"),
        d_model=fields.number("hidden_size"),
        num_layers=num_layers,
        groups=tuple(groups),
        tied=bool(fields.one_of("tie_word_embeddings", (True, False, None), False)),
        norm_eps=fields.number("rms_norm_eps", 1e-6, float),
        multi_token=_multi_token(fields, num_layers, tensors),
    )
    try:
        validate(config)
    except UserError as error:
        raise UserError(f"config.json describes no model that dsjax has: {error}") from None
    return config


def longest_text(hf: Mapping[str, Any]) -> int:
    """The positions that the model of a config.json is meant for.

    Raises:
        UserError: their number is none.
    """
    longest = _Fields(hf).number("max_position_embeddings", 2048)
    if longest < 1:
        raise UserError(f"config.json: max_position_embeddings is {longest}; it must be at least 1")
    return longest


def _multi_token(fields: _Fields, num_layers: int, tensors: Container[str]) -> MultiTokenConfig | None:
    modules = fields.number("num_nextn_predict_layers", 0)
    if not modules or f"model.layers.{num_layers}.eh_proj.weight" not in tensors:
        return None
    return MultiTokenConfig(modules)


def _grouped_attention(fields: _Fields) -> AttentionConfig:
    heads = fields.number("num_attention_heads")
    theta, scaling = _rope(fields)
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=fields.number("num_key_value_heads", heads),
        head_dim=fields.number("head_dim", fields.number("hidden_size") // max(heads, 1)),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=fields.fields["model_type"] == "qwen2",
    )


def _latent_attention(fields: _Fields) -> LatentAttentionConfig:
    theta, scaling = _rope(fields)
    return LatentAttentionConfig(
        num_heads=fields.number("num_attention_heads"),
        q_rank=fields.number("q_lora_rank", None),
        kv_rank=fields.number("kv_lora_rank"),
        nope_dim=fields.number("qk_nope_head_dim"),
        rope_dim=fields.number("qk_rope_head_dim"),
        v_dim=fields.number("v_head_dim"),
        rope_theta=theta,
        rope_scaling=scaling,
        indexer=_indexer(fields) if fields.fields["model_type"] == "deepseek_v32" else None,
    )


def _indexer(fields: _Fields) -> IndexerConfig:
    """What V3.2 has beside V3; it has two more fields that can say of each layer what it is."""
    fields.one_of("rope_interleave", (True, None))
    num_layers = fields.number("num_hidden_layers")
    num_dense = min(fields.number("first_k_dense_replace", 3), num_layers)
    fields.one_of("layer_types", (["indexed_attention"] * num_layers, None))
    fields.one_of("mlp_layer_types", (["dense"] * num_dense + ["sparse"] * (num_layers - num_dense), None))
    return IndexerConfig(
        num_heads=fields.number("index_n_heads", 64),
        head_dim=fields.number("index_head_dim", 128),
        top_k=fields.number("index_topk", 2048),
    )


def _experts(fields: _Fields) -> MoEConfig:
    """Routing; the losses that keep it balanced are those of the papers, for who trains on."""
    kind = fields.fields["model_type"]
    sigmoid = kind in SIGMOID
    fields.one_of("scoring_func", ("sigmoid",) if sigmoid else ("softmax",), "sigmoid" if sigmoid else "softmax")
    methods = {"deepseek": (None, "greedy"), "deepseek_v2": (None, "greedy", "group_limited_greedy")}
    method = fields.one_of("topk_method", methods.get(kind, (None, "noaux_tc")))
    limited = sigmoid or method == "group_limited_greedy"
    # Hugging Face's V2 has no normalised weights, whatever norm_topk_prob says; the published models have none either.
    normalize = kind != "deepseek_v2" and bool(fields.fields.get("norm_topk_prob", sigmoid))
    return MoEConfig(
        num_experts=fields.number("n_routed_experts"),
        top_k=fields.number("num_experts_per_tok"),
        d_ff=fields.number("moe_intermediate_size"),
        num_shared_experts=fields.number("n_shared_experts", 0),
        scoring="sigmoid" if sigmoid else "softmax",
        num_groups=fields.number("n_group", 1) if limited else 1,
        top_groups=fields.number("topk_group", 1) if limited else 1,
        group_score="top2" if sigmoid else "max",
        normalize_weights=normalize,
        routed_scale=1.0 if kind == "deepseek" else fields.number("routed_scaling_factor", 1.0, float),
        balance_coef=0.0,
        sequence_coef=1e-4 if sigmoid else fields.number("aux_loss_alpha", 1e-3, float),
        selection_bias=sigmoid,
    )


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """Base and stretching, from the older ``rope_theta`` and ``rope_scaling``, or from ``rope_parameters``.

    As in transformers, ``rope_scaling`` counts where it is there, too.
    """
    hf = fields.fields
    found = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(found, Mapping) or any(isinstance(value, Mapping) for value in found.values()):
        raise UserError("config.json: its rope_parameters differ from layer to layer; dsjax has one for all")
    rope = _Fields({**found, "model_type": hf["model_type"]})
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0, float), float)
    kind = found.get("rope_type", found.get("type", "default"))
    if found.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"config.json: partial_rotary_factor is {found['partial_rotary_factor']!r}; dsjax has 1")
    if kind in ("default", None):
        return theta, None
    if kind == "linear":
        return theta, LinearScaling(rope.number("factor", kind=float))
    longest = longest_text(hf)
    name = "original_max_position_embeddings"  # where it stands beside the others, transformers goes by that
    original = fields.number(name, rope.number(name, longest))
    if kind == "yarn":
        return theta, YarnScaling(
            factor=rope.number("factor", longest / max(original, 1), float),
            original_length=original,
            beta_fast=rope.number("beta_fast", 0, float) or 32.0,
            beta_slow=rope.number("beta_slow", 0, float) or 1.0,
            mscale=rope.number("mscale", 0.0, float),
            mscale_all_dim=rope.number("mscale_all_dim", 0.0, float),
            fixed_amplitude=rope.number("attention_factor", None, float),
            whole_channels=bool(found.get("truncate", True)),
        )
    if kind == "llama3":
        low, high = (rope.number(f"{end}_freq_factor", kind=float) for end in ("low", "high"))
        return theta, Llama3Scaling(rope.number("factor", kind=float), low, high, original)
    raise UserError(f"config.json: rope_type is {kind!r}; dsjax has default, linear, yarn and llama3")


# ---------------------------------------------------------------- and back


def describes(hf: Mapping[str, Any], tensors: Container[str], config: DecoderConfig) -> bool:
    """Whether a config.json describes a model; what only training uses may be anything.

    Args:
        hf, tensors: as :func:`config_from_hf` is given them.
        config: the model.

    Raises:
        UserError: it is another one, and no family of Hugging Face's can express it.
    """
    there = config_from_hf(hf, tensors)
    if config == there:
        return True
    own, other = (hf_config(model, max_length=1) for model in (config, there))
    return own | {"aux_loss_alpha": 0} == other | {"aux_loss_alpha": 0}  # the weight of a loss


def meant_length(hf: Mapping[str, Any], config: DecoderConfig, trained: int) -> int:
    """The positions that a model is meant for which began as the one of a config.json.

    Those stated there while its rotary angles are as they were; else the ``trained`` ones that it has learned from.
    """
    now, before = (
        {(g.attention.rope_theta, g.attention.rope_scaling) for g in model.groups}
        for model in (config, config_from_hf(hf))
    )
    return longest_text(hf) if now == before else trained


def hf_config(config: DecoderConfig, *, max_length: int, end_ids: tuple[int, ...] = (), dtype: str = "float32") -> dict:
    """A config.json for a model, in the family that has its parts.

    Args:
        config: the model.
        max_length: positions that it is meant for.
        end_ids: tokens that end a text.
        dtype: of the weights.

    Raises:
        UserError: names what no family of Hugging Face's can express.
    """
    kind, experts = _family(config)
    attention = config.groups[0].attention
    dense = next((g.ffn for g in config.groups if isinstance(g.ffn, MLPConfig)), None)
    found: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": dense.d_ff if dense is not None else experts.d_ff if experts is not None else 0,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": max_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": list(end_ids) if len(end_ids) > 1 else end_ids[0] if end_ids else None,
        "torch_dtype": dtype,
        **_rope_to_hf(attention.rope_theta, attention.rope_scaling),
    }
    if isinstance(attention, LatentAttentionConfig):
        found |= {
            "num_key_value_heads": attention.num_heads,
            "q_lora_rank": attention.q_rank,
            "kv_lora_rank": attention.kv_rank,
            "qk_nope_head_dim": attention.nope_dim,
            "qk_rope_head_dim": attention.rope_dim,
            "v_head_dim": attention.v_dim,
        }
        if attention.indexer is not None:
            found |= {
                "index_n_heads": attention.indexer.num_heads,
                "index_head_dim": attention.indexer.head_dim,
                "index_topk": attention.indexer.top_k,
            }
    else:
        found |= {"num_key_value_heads": attention.num_kv_heads, "head_dim": attention.head_dim}
    if kind == "qwen2":
        del found["attention_bias"]
        found["use_sliding_window"] = False
    if kind.startswith("deepseek"):
        found |= _experts_to_hf(kind, config, experts)
    return found


def _family(config: DecoderConfig) -> tuple[str, MoEConfig | None]:
    """The model type that has the parts of a model, and its experts if it has some."""
    dense = [g.ffn for g in config.groups if isinstance(g.ffn, MLPConfig)]
    sparse = [g.ffn for g in config.groups if isinstance(g.ffn, MoEConfig)]
    attention = config.groups[0].attention
    reasons = {
        "hashed n-grams": config.ngram is not None,
        "a copy head": config.copy is not None,
        "features of the syntax": config.structure is not None,
        "layer groups of several kinds of attention": any(g.attention != attention for g in config.groups),
        "more than dense layers and then layers of experts": len(dense) > 1
        or len(sparse) > 1
        or (bool(sparse) and not isinstance(config.groups[-1].ffn, MoEConfig)),
        "segmented attention": attention.segmented is not None,
        "a window": attention.window is not None,
        "convolutions": attention.conv_taps > 0,
        "normalised queries and keys": isinstance(attention, AttentionConfig) and attention.qk_norm,
    }
    experts = sparse[0] if sparse else None
    latent = isinstance(attention, LatentAttentionConfig)
    indexed = isinstance(attention, LatentAttentionConfig) and attention.indexer is not None
    of_v3 = "deepseek_v32" if indexed else "deepseek_v3"
    reasons["an indexer that is warming up"] = only_indexers_learn([attention])
    if experts is None:
        kind = of_v3 if latent else "qwen2" if attention.qkv_bias else "llama"  # type: ignore[union-attr]
    elif not latent:
        kind = "deepseek"
        reasons |= {
            "biases of queries, keys and values beside experts": attention.qkv_bias,  # type: ignore[union-attr]
            "grouped-query attention with a sigmoid router": experts.scoring != "softmax",
            "grouped-query attention with groups of experts": experts.num_groups > 1,
            "grouped-query attention with a scale of routed experts": experts.routed_scale != 1,
        }
    elif experts.scoring == "softmax":
        kind = "deepseek_v2"
        reasons |= {
            "latent attention with normalised weights of a softmax router": experts.normalize_weights,
            "an indexer beside a softmax router": indexed,
        }
    else:
        kind = of_v3
    if experts is not None:
        score = "top2" if experts.scoring == "sigmoid" else "max"
        reasons |= {
            f"groups of experts that count by {experts.group_score}": experts.num_groups > 1
            and experts.group_score != score,
            "a sigmoid router without a selection bias": experts.scoring == "sigmoid" and not experts.has_bias,
            "a selection bias of a softmax router": experts.scoring == "softmax" and experts.has_bias,
        }
    reasons["multi-token prediction without latent attention and a sigmoid router"] = (
        config.multi_token is not None and kind not in SIGMOID
    )
    for reason, there in reasons.items():
        if there:
            raise UserError(f"the model has {reason}, which no model type of Hugging Face's that dsjax knows has")
    return kind, experts


def _experts_to_hf(kind: str, config: DecoderConfig, experts: MoEConfig | None) -> dict[str, Any]:
    num_dense = sum(n for group, n in config.sized_groups() if isinstance(group.ffn, MLPConfig))
    modules = 0 if config.multi_token is None else config.multi_token.num_modules
    of_v3 = {"rope_interleave": True, "num_nextn_predict_layers": modules}
    if experts is None:
        return {"n_routed_experts": 1, "first_k_dense_replace": num_dense, **of_v3}
    found: dict[str, Any] = {
        "n_routed_experts": experts.num_experts,
        "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.d_ff,
        "n_shared_experts": experts.num_shared_experts or (None if kind == "deepseek" else 0),
        "first_k_dense_replace": num_dense,
        "moe_layer_freq": 1,
        "scoring_func": experts.scoring,
        "norm_topk_prob": experts.normalize_weights,
    }
    if kind != "deepseek":
        found |= {
            "routed_scaling_factor": experts.routed_scale,
            "n_group": experts.num_groups,
            "topk_group": experts.top_groups,
        }
    if kind in SIGMOID:
        return found | {"topk_method": "noaux_tc", **of_v3}
    limited = "group_limited_greedy" if experts.num_groups > 1 else "greedy"
    return found | {"topk_method": limited, "aux_loss_alpha": experts.sequence_coef, "seq_aux": True}


def _rope_to_hf(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Both the older fields and the newer one that holds them all."""
    found: dict[str, Any] = {}
    if isinstance(scaling, LinearScaling):
        found = {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, Llama3Scaling):
        found = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    elif isinstance(scaling, YarnScaling):
        found = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "mscale": scaling.mscale,
            "mscale_all_dim": scaling.mscale_all_dim,
            "truncate": scaling.whole_channels,
        }
        if scaling.fixed_amplitude is not None:
            found["attention_factor"] = scaling.fixed_amplitude
    older = {"rope_theta": theta, "rope_scaling": found | {"type": found["rope_type"]} if found else None}
    return older | {"rope_parameters": {"rope_type": "default"} | found | {"rope_theta": theta}}
