"""Tiny random models of the families by Hugging Face transformers: folders to load, and what it computes of them.

Run by an interpreter that has PyTorch and transformers (``scripts/bench parity`` makes one):

    python torch_parity.py OUT NAME ...
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import numpy as np
import torch
import transformers

SMALL = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
}

# Of few heads often none is positive: scores of 0, and of equal ones PyTorch chooses any.
V32 = LATENT | {"n_group": 4, "topk_group": 2, "index_topk": 10, "index_n_heads": 16, "index_head_dim": 12}


def yarn(**more: Any) -> dict[str, Any]:
    base = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    return {"rope_parameters": base | more}


# Name -> (model type, fields beside those above).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, GQA, tied": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama, one head of keys, wide": ("llama", {"num_key_value_heads": 1, "head_dim": 20, "rms_norm_eps": 1e-5}),
    "llama, llama3 rope": (
        "llama",
        {
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 500000.0,
            },
        },
    ),
    "llama, yarn": ("llama", yarn()),
    "llama, yarn, amplitude": ("llama", yarn(attention_factor=1.3, beta_fast=16, beta_slow=2)),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0}}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen2, tied, theta": (
        "qwen2",
        {
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        },
    ),
    "v2, greedy": ("deepseek_v2", LATENT | {"topk_method": "greedy", "n_group": None, "topk_group": None}),
    "v2, groups": (
        "deepseek_v2",
        LATENT | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
    ),
    "v2, straight queries, mscale": (
        "deepseek_v2",
        LATENT | yarn(mscale=0.707, mscale_all_dim=0.707) | {"q_lora_rank": None, "n_shared_experts": 2},
    ),
    "v2, yarn without mscale": ("deepseek_v2", LATENT | yarn()),
    "v2, norm_topk_prob": ("deepseek_v2", LATENT | {"norm_topk_prob": True}),
    "v3": ("deepseek_v3", LATENT | {"n_group": 4, "topk_group": 2}),
    "v3, 16 experts, top 4, one group": (
        "deepseek_v3",
        LATENT | {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1},
    ),
    "v3, halves apart": ("deepseek_v3", LATENT | {"n_group": 2, "topk_group": 1, "rope_interleave": False}),
    "v3, not normalised": (
        "deepseek_v3",
        LATENT | {"n_group": 2, "topk_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    ),
    "v3, straight queries, two dense layers": (
        "deepseek_v3",
        LATENT | {"q_lora_rank": None, "first_k_dense_replace": 2, "n_group": 2, "topk_group": 2},
    ),
    "v3, no dense layer, tied": (
        "deepseek_v3",
        LATENT | {"first_k_dense_replace": 0, "n_group": 2, "topk_group": 2, "tie_word_embeddings": True},
    ),
    "v3, all dense": ("deepseek_v3", LATENT | {"first_k_dense_replace": 9, "n_group": 2, "topk_group": 2}),
    "v3, yarn without mscale": ("deepseek_v3", LATENT | yarn() | {"n_group": 2, "topk_group": 2}),
    "v3, yarn, mscale_all_dim alone": (
        "deepseek_v3",
        LATENT | yarn(mscale_all_dim=1.0) | {"n_group": 2, "topk_group": 2},
    ),
    "v3, yarn, two mscales": (
        "deepseek_v3",
        LATENT | yarn(mscale=1.0, mscale_all_dim=0.5, beta_fast=8) | {"n_group": 2, "topk_group": 2},
    ),
    "v3.2, 10 of 40 positions": ("deepseek_v32", V32 | yarn(mscale=1.0, mscale_all_dim=1.0)),
    "v3.2, all positions": ("deepseek_v32", V32 | {"index_topk": 64}),
    "v3, linear": (
        "deepseek_v3",
        LATENT
        | {
            "n_group": 2,
            "topk_group": 2,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        },
    ),
}


def random_model(kind: str, fields: dict[str, Any], seed: int) -> Any:
    """A model whose weights, norms and biases all matter."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor_name.endswith(("norm.weight",)):
                tensor.copy_(1 + 0.2 * torch.randn_like(tensor))
            elif "bias" in tensor_name:
                tensor.copy_(0.2 * torch.randn_like(tensor))
            elif tensor.ndim >= 2:
                tensor.copy_(1.3 * torch.randn_like(tensor) * tensor.shape[-1] ** -0.5)
    return model


def make(name: str, folder: pathlib.Path) -> None:
    """One model: its folder, and in ``reference.npz`` what it gives: logits, loss, gradients, greedy tokens."""
    kind, fields = VARIANTS[name]
    model = random_model(kind, SMALL | fields, sum(map(ord, name)))
    config = model.config
    model.save_pretrained(folder)
    ids = torch.randint(2, config.vocab_size, (2, 40))
    out = model(ids, labels=ids)
    out.loss.backward()
    saved: dict[str, Any] = {"input_ids": ids, "logits": out.logits, "loss": out.loss}
    for tensor_name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.ndim <= 2:
            saved[f"grad/{tensor_name}"] = parameter.grad
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        saved |= {"pad_mask": mask, "pad_logits": model(ids, attention_mask=mask).logits}
        greedy = model.generate(ids[:, :24], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        saved["greedy"] = greedy[:, 24:]
    arrays: dict[str, Any] = {key: np.asarray(value.detach()) for key, value in saved.items()}
    np.savez(folder / "reference.npz", **arrays)


def main() -> None:
    out, *names = sys.argv[1:]
    for name in names or VARIANTS:
        make(name, pathlib.Path(out) / name)
        print(json.dumps(name), flush=True)


if __name__ == "__main__":
    main()
