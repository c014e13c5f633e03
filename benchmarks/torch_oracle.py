"""Makes ``v32`` and ``v32_all`` of tests/oracles: tiny random models by Hugging Face transformers, and their results.

Run by an interpreter that has PyTorch and transformers:

    python benchmarks/torch_oracle.py tests/oracles

What a model's ``oracle.npz`` holds is what tests/test_oracles.py reads. Of equal scores PyTorch chooses any, and of
nearly equal ones rounding decides: so weights are drawn anew until no choice of a position is that close.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch_parity import LATENT, SMALL, random_model, yarn

LENGTH, PREFILL, GREEDY, PADDING = 64, 32, 16, 8
NARROW = SMALL | LATENT | {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 12}
INDEXED = NARROW | {"n_group": 4, "topk_group": 2, "index_n_heads": 6, "index_head_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "v32": INDEXED | {"index_topk": 16} | yarn(mscale=1.0, mscale_all_dim=1.0),
    "v32_all": INDEXED | {"index_topk": 128},
}
GRADIENTS = ("embed_tokens", "lm_head", "layers.1.self_attn.q", "layers.1.self_attn.kv", "layers.2.mlp.gate.weight")
NEAR = 2e-5  # a difference of scores; they are of about 0.3, and rounded to some 1e-6


@contextmanager
def closest_choice(top_k: int) -> Iterator[list[float]]:
    """Collects, of each call of an indexer's top-k, the least difference between what is and what is not chosen."""
    found, topk = [1.0], torch.Tensor.topk

    def watched(x: Any, k: int, *args: Any, **kwargs: Any) -> Any:
        if x.ndim == 3 and k == top_k < x.shape[-1]:
            values = x.sort(dim=-1, descending=True).values
            gaps = (values[..., k - 1] - values[..., k])[values[..., k] > -1e30]
            found.append(float(gaps.min()) if gaps.numel() else 1.0)
        return topk(x, k, *args, **kwargs)

    torch.Tensor.topk = watched
    try:
        yield found
    finally:
        torch.Tensor.topk = topk


def results(model: Any) -> dict[str, torch.Tensor]:
    """All that the tests compare."""
    ids = torch.randint(2, model.config.vocab_size, (2, LENGTH))
    out = model(ids, labels=ids, output_hidden_states=True)
    out.loss.backward()
    with_gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    saved = {"input_ids": ids, "logits": out.logits, "loss": out.loss}
    saved[f"hidden_{model.config.num_hidden_layers}"] = out.hidden_states[-1]
    saved["grad_norm"] = torch.sqrt(sum(torch.sum(g**2) for g in with_gradient.values()))
    saved |= {f"grad/{name}": g for name, g in with_gradient.items() if any(part in name for part in GRADIENTS)}
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    with torch.no_grad():
        saved |= {"pad_mask": mask, "pad_logits": model(ids, attention_mask=mask).logits}
        step = model(ids[:, :PREFILL], use_cache=True)
        decoded = [step.logits[:, -1]]
        for t in range(PREFILL, LENGTH):
            step = model(ids[:, t : t + 1], cache=step.cache, use_cache=True)
            decoded.append(step.logits[:, -1])
        saved["decode_logits"] = torch.stack(decoded, dim=1)
        greedy = model.generate(ids, max_new_tokens=GREEDY, do_sample=False, eos_token_id=None, pad_token_id=0)
        saved["greedy"] = greedy[:, LENGTH:]
    return saved


def main() -> None:
    out = pathlib.Path(sys.argv[1])
    for name, fields in MODELS.items():
        for seed in range(1000):
            model = random_model("deepseek_v32", fields, seed)
            with closest_choice(fields["index_topk"]) as gaps:
                saved = results(model)
            if min(gaps) > NEAR:
                break
        arrays: dict[str, Any] = {key: np.asarray(value.detach()) for key, value in saved.items()}
        model.save_pretrained(out / name)
        (out / name / "generation_config.json").unlink()
        np.savez_compressed(out / name / "oracle.npz", **arrays)
        told = {
            "cls": type(model).__name__,
            "seed": seed,
            "n_params": model.num_parameters(),
            "logits_std": float(arrays["logits"].std()),
            "closest_choice": min(gaps),
            "decode_vs_full": float(np.abs(arrays["decode_logits"] - arrays["logits"][:, PREFILL - 1 :]).max()),
            "keys": {tensor: list(x.shape) for tensor, x in load_file(out / name / "model.safetensors").items()},
        }
        (out / name / "oracle.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        print({key: value for key, value in told.items() if key != "keys"}, flush=True)


if __name__ == "__main__":
    main()
