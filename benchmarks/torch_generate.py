"""Hugging Face's ``generate`` on the checkpoints of :mod:`benchmarks.generate_models`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks.generate import prompts


class Clock(StoppingCriteria):
    """Looks at the clock behind each token, and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def make(cache: str, folder: str) -> Callable[[str, int, int, int], tuple[float, list[list[int]]]]:
    """(case, batch, length of prompts, new tokens) -> seconds and tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()

    def run(case: str, batch: int, length: int, new: int) -> tuple[float, list[list[int]]]:
        ids, clock = torch.tensor(prompts(batch, length, model.config.vocab_size)), Clock()
        begin = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=None,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                cache_implementation=None if cache == "dynamic" else "static",
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        tokens = out[:, length:].tolist()
        if case == "prefill":
            return clock.times[0] - begin, tokens
        return clock.times[-1] - clock.times[0], tokens

    return run
