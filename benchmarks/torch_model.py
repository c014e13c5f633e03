"""The benchmark models in PyTorch, the fast obvious way: fused attention, fused AdamW, eager.

The MoE layer is Hugging Face's: a loop over the experts that gathers each one's tokens and adds
their outputs back with ``index_add_``. ``compile=True`` runs the model through ``torch.compile``.

    python -m benchmarks.timing compare dense torch torch_compile
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.timing import SPECS, Spec, make_batch


def rope(x_BNTH: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor) -> torch.Tensor:
    """Rotates the two halves of each head; the tables hold H/2 angles."""
    a, b = x_BNTH.chunk(2, dim=-1)
    return torch.cat([a * cos_TH - b * sin_TH, a * sin_TH + b * cos_TH], dim=-1)


class Attention(nn.Module):
    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.qkv = nn.Linear(spec.d_model, 3 * spec.d_model, bias=False)
        self.out = nn.Linear(spec.d_model, spec.d_model, bias=False)

    def forward(self, x_BTD, mask_B1TS, angles):
        B, T, D = x_BTD.shape
        q, k, v = (
            part.view(B, T, self.spec.num_heads, self.spec.d_head).transpose(1, 2)
            for part in self.qkv(x_BTD).split(D, dim=-1)
        )
        q, k = rope(q, *angles), rope(k, *angles)
        if mask_B1TS is None:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1TS)
        return self.out(o.transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Module):
    def __init__(self, spec: Spec):
        super().__init__()
        self.gate_up = nn.Linear(spec.d_model, 2 * spec.d_ff, bias=False)
        self.down = nn.Linear(spec.d_ff, spec.d_model, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class MoE(nn.Module):
    """As in Hugging Face's Mixtral: loop over experts, gather, compute, ``index_add_``."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.router = nn.Linear(spec.d_model, spec.num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(spec) for _ in range(spec.num_experts))

    def forward(self, x_BTD):
        x_RD = x_BTD.reshape(-1, x_BTD.shape[-1])
        probs_RE = F.softmax(self.router(x_RD), dim=-1)
        gates_RX, chosen_RX = probs_RE.topk(self.spec.experts_per_token, dim=-1)
        gates_RX = gates_RX / gates_RX.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(x_RD)
        chosen_EXR = F.one_hot(chosen_RX, self.spec.num_experts).permute(2, 1, 0)
        for e, expert in enumerate(self.experts):
            slot, row = torch.where(chosen_EXR[e])
            out.index_add_(0, row, expert(x_RD[row]) * gates_RX[row, slot, None])
        share_E = chosen_EXR.float().mean(dim=(1, 2))
        return out.view_as(x_BTD), self.spec.num_experts * (share_E * probs_RE.mean(dim=0)).sum()


class Block(nn.Module):
    def __init__(self, spec: Spec):
        super().__init__()
        self.attention_norm = nn.RMSNorm(spec.d_model, eps=1e-6)
        self.attention = Attention(spec)
        self.ff_norm = nn.RMSNorm(spec.d_model, eps=1e-6)
        self.ff = MoE(spec) if spec.num_experts else FeedForward(spec)

    def forward(self, x_BTD, mask_B1TS, angles):
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), mask_B1TS, angles)
        y = self.ff(self.ff_norm(x_BTD))
        y, balance = y if isinstance(y, tuple) else (y, 0.0)
        return x_BTD + y, balance


class Model(nn.Module):
    def __init__(self, spec: Spec, documents: bool):
        super().__init__()
        self.spec, self.documents = spec, documents
        self.embed = nn.Embedding(spec.vocab_size, spec.d_model)
        self.layers = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
        self.final_norm = nn.RMSNorm(spec.d_model, eps=1e-6)
        self.head = nn.Linear(spec.d_model, spec.vocab_size, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.trunc_normal_(p, std=spec.d_model**-0.5)

    def forward(self, batch):
        """Mean cross-entropy, plus 0.01 of the experts' balance loss."""
        tokens_BT = batch["tokens"]
        T, spec = tokens_BT.shape[1], self.spec
        frequencies = 10000.0 ** (-torch.arange(0, spec.d_head, 2) / spec.d_head)
        angles_TH = torch.arange(T)[:, None] * frequencies
        angles = angles_TH.cos(), angles_TH.sin()
        mask_B1TS = None
        if self.documents:
            ids = batch["documents"]
            causal = torch.ones(T, T, dtype=torch.bool).tril()
            mask_B1TS = (ids[:, None, :, None] == ids[:, None, None, :]) & causal

        x, balance = self.embed(tokens_BT), 0.0
        for layer in self.layers:
            x, layer_balance = layer(x, mask_B1TS, angles)
            balance = balance + layer_balance / spec.num_layers
        logits_RV = self.head(self.final_norm(x)).flatten(0, 1)
        return F.cross_entropy(logits_RV, batch["targets"].flatten()) + 0.01 * balance


def make(name: str, *, compile: bool = False, documents: bool = False) -> tuple[Any, Callable, Callable]:
    """The model ``name`` as ``(state, step_fn, make_batch)``: ``state, loss = step_fn(state, batch)``.

    ``documents`` masks attention by packed documents; without it attention is PyTorch's plain causal one, its
    fastest. The state is updated in place.
    """
    spec = SPECS[name]
    torch.manual_seed(0)
    model = Model(spec, documents)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    loss_fn = torch.compile(model) if compile else model

    def step(state, batch):
        loss = loss_fn(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return state, loss.detach()

    def batch(seed: int = 0) -> dict[str, torch.Tensor]:
        return {k: torch.from_numpy(v).long() if v.dtype.kind == "i" else torch.from_numpy(v)
                for k, v in make_batch(spec, seed).items()}  # fmt: skip

    return (model, optimizer), step, batch


def make_compiled(name: str) -> tuple[Any, Callable, Callable]:
    return make(name, compile=True)
