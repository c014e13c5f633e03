"""GRPO as a plain loop of Hugging Face transformers and PyTorch: what :mod:`benchmarks.r1_speed` times dsjax beside.

    generate    all texts in one batch, prompts padded in front, KV cache, sampled from the whole distribution
    reward      text.decode, then the answer behind the last mark
    learn       one forward pass over the texts, the clipped loss, backward, clip, AdamW

What is known to make such a loop fast is done: weights and activations in float32 as there, fused attention (``sdpa``),
``inference_mode`` and no gradient while texts are written, logits of the texts' places alone, AdamW in one kernel
(``fused``), glibc told to keep freed memory as dsjax tells it. Groups whose rewards are all equal have no part in the
loss, so their rows are not computed, and rows are no longer than the longest that is left. There is one update a batch
of texts, so old log-probabilities are the present ones and cost nothing (only the check is given others).

Kinds: ``hf`` with the cache that grows (the default), ``hf_static`` with one of full length. Both are eager;
``torch.compile`` is not timed.

    python -m benchmarks.torch_grpo serve hf@FOLDER      # a worker: a case a line, figures back
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dsjax.runtime import keep_freed_memory


class Loop:
    """A policy that learns from texts of its own.

    Args:
        kind: see above.
        folder: with ``hf``, the model, and ``r1.json``, the run's config.
    """

    def __init__(self, kind: str, folder: pathlib.Path):
        config = json.loads((folder / "r1.json").read_text(encoding="utf-8"))
        self.rollout, self.optim, self.mark = config["rollout"], config["optim"], config["exercises"]["answer_mark"]
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "hf" / "tokenizer.json"))
        self.model = AutoModelForCausalLM.from_pretrained(
            folder / "hf", dtype=torch.float32, attn_implementation="sdpa"
        )
        self.end_id, self.cache = self.model.config.eos_token_id, None if kind == "hf" else "static"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.optim["lr"],
            betas=(self.optim["b1"], self.optim["b2"]),
            eps=self.optim["eps"],
            weight_decay=self.optim["weight_decay"],
            fused=True,
        )

    def iteration(self, case: dict[str, Any]) -> dict[str, Any]:
        """Texts, rewards and an update, and seconds by phase."""
        begin = time.process_time()
        ids_BT, mask_BT, prompt_length = self.generate(case["prompts"])
        wrote = time.process_time()
        rewards_B = self.rewards(ids_BT[:, prompt_length:], mask_BT[:, prompt_length:], case["answers"])
        judged = time.process_time()
        found = self.learn(ids_BT, mask_BT, prompt_length, rewards_B)
        end, lengths_B = time.process_time(), mask_BT[:, prompt_length:].sum(dim=1)
        return found | {
            "seconds": {"rollout": wrote - begin, "reward": judged - wrote, "update": end - judged},
            "compiled": 0,
            "texts": len(ids_BT),
            "written": int(lengths_B.sum()),
            "longest": int(lengths_B.max()),
            "reward": float(rewards_B.mean()),
        }

    # ------------------------------------------------------------ texts

    def generate(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Prompts with their texts, where there is a token, and how long the prompts are with their padding."""
        ids_PT, mask_PT = self.padded(prompts, front=True)
        with torch.inference_mode():
            ids_BT = self.model.generate(
                ids_PT,
                attention_mask=mask_PT,
                max_new_tokens=self.rollout["max_tokens"],
                num_return_sequences=self.rollout["samples"],
                do_sample=True,
                temperature=self.rollout["temperature"],
                top_k=0,
                top_p=1.0,
                eos_token_id=self.end_id,
                pad_token_id=self.end_id,
                cache_implementation=self.cache,
            )
        texts_BN = ids_BT[:, ids_PT.shape[1] :]
        ended_BN = (texts_BN == self.end_id).cumsum(dim=1)
        is_text_BN = (ended_BN == 0) | ((ended_BN == 1) & (texts_BN == self.end_id))
        mask_BP = mask_PT.repeat_interleave(self.rollout["samples"], dim=0)
        # Tensors that were made in inference mode have no part in a backward pass.
        return ids_BT.clone(), torch.cat([mask_BP, is_text_BN.long()], dim=1), ids_PT.shape[1]

    def padded(self, rows: list[list[int]], *, front: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of one length, padded in front or behind, and 1 where there is a token."""
        length = max(map(len, rows))
        pad, mask = [[self.end_id] * (length - len(row)) for row in rows], [[0] * (length - len(row)) for row in rows]
        real = [[1] * len(row) for row in rows]
        join = (lambda a, b: [*a, *b]) if front else (lambda a, b: [*b, *a])
        return torch.tensor(list(map(join, pad, rows))), torch.tensor(list(map(join, mask, real)))

    def rewards(self, texts_BN: torch.Tensor, mask_BN: torch.Tensor, answers: list[str]) -> torch.Tensor:
        """1 for a text that ended, and whose last mark stands in front of the answer; else 0."""
        lengths, samples = mask_BN.sum(dim=1).tolist(), self.rollout["samples"]
        rows = [row[:length] for row, length in zip(texts_BN.tolist(), lengths, strict=True)]
        texts = self.tokenizer.batch_decode([row[:-1] if row[-1] == self.end_id else row for row in rows])
        ended = [row[-1] == self.end_id for row in rows]
        right = [answers[n // samples] for n in range(len(texts))]
        return torch.tensor([self.is_right(*one) for one in zip(texts, ended, right, strict=True)], dtype=torch.float32)

    def is_right(self, text: str, ended: bool, answer: str) -> bool:
        _, found, behind = text.rpartition(self.mark.strip())
        return ended and bool(found) and " ".join(behind.split()) == " ".join(answer.split())

    # ------------------------------------------------------------ learning

    def learn(
        self,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor,
        prompt_length: int,
        rewards_B: torch.Tensor,
        old_log_prob_BN: torch.Tensor | None = None,
    ) -> dict[str, float]:
        """An update by the texts of groups that have different rewards; its loss, gradient norm and tokens."""
        advantage_B, alive_B = self.advantages(rewards_B)
        if not alive_B.any():
            return {"loss": 0.0, "grad_norm": 0.0, "learned": 0}
        longest = int(mask_BT[alive_B][:, prompt_length:].sum(dim=1).max())
        ids_BT, mask_BT = (x_BT[alive_B, : prompt_length + longest] for x_BT in (ids_BT, mask_BT))
        log_prob_BN = self.log_probs(ids_BT, mask_BT, longest)
        old_BN = log_prob_BN.detach() if old_log_prob_BN is None else old_log_prob_BN[alive_B, :longest]
        loss = clipped_loss(log_prob_BN, old_BN, advantage_B[alive_B], mask_BT[:, prompt_length:])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim["clip_norm"])
        self.optimizer.step()
        return {"loss": loss.item(), "grad_norm": norm.item(), "learned": int(mask_BT[:, prompt_length:].sum())}

    def advantages(self, rewards_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each text in its group, in standard deviations; and whether the group has different rewards."""
        groups_PK = rewards_B.view(-1, self.rollout["samples"])
        off_PK = groups_PK - groups_PK.mean(dim=1, keepdim=True)
        std_P1 = groups_PK.std(dim=1, correction=0, keepdim=True)
        alive_P1 = groups_PK.amax(dim=1, keepdim=True) > groups_PK.amin(dim=1, keepdim=True)
        return (off_PK / (std_P1 + 1e-6)).view(-1), alive_P1.expand_as(groups_PK).reshape(-1)

    def log_probs(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, length: int) -> torch.Tensor:
        """Of the last ``length`` tokens of each row."""
        out = self.model(ids_BT, attention_mask=mask_BT, logits_to_keep=length + 1, use_cache=False)
        log_probs_BNV = torch.log_softmax(out.logits[:, :-1], dim=-1)
        return log_probs_BNV.gather(2, ids_BT[:, -length:, None])[..., 0]

    # ------------------------------------------------------------ the check

    def learn_given(self, case: dict[str, Any]) -> dict[str, Any]:
        """Learns from given texts; writes its weights to ``case["to"]``."""
        given, samples = case["learn"], self.rollout["samples"]
        ids_PT, mask_PT = self.padded(case["prompts"], front=True)
        rows = [[*t, *[self.end_id] * e] for t, e in zip(given["tokens"], given["ended"], strict=True)]
        texts_BN, mask_BN = self.padded(rows, front=False)
        ids_BT = torch.cat([ids_PT.repeat_interleave(samples, dim=0), texts_BN], dim=1)
        mask_BT = torch.cat([mask_PT.repeat_interleave(samples, dim=0), mask_BN], dim=1)
        old_BN = torch.zeros(mask_BN.shape)
        for n, row in enumerate(given["log_probs"]):
            old_BN[n, : len(row)] = torch.tensor(row)
        rewards_B = self.rewards(texts_BN, mask_BN, case["answers"])
        found = self.learn(ids_BT, mask_BT, ids_PT.shape[1], rewards_B, old_BN)
        save_file({name: x.detach() for name, x in self.model.named_parameters()}, case["to"])
        return found | {"rewards": rewards_B.tolist()}


def clipped_loss(
    log_prob_BN: torch.Tensor,
    old_BN: torch.Tensor,
    advantage_B: torch.Tensor,
    mask_BN: torch.Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> torch.Tensor:
    """The mean over all tokens of -min(r A, clip(r) A), DAPO's (arXiv 2503.14476)."""
    ratio_BN = torch.exp(torch.where(mask_BN > 0, log_prob_BN - old_BN, 0))
    clipped_BN = ratio_BN.clamp(1 - clip_low, 1 + clip_high)
    gain_BN = torch.minimum(ratio_BN * advantage_B[:, None], clipped_BN * advantage_B[:, None])
    return -(gain_BN * mask_BN).sum() / mask_BN.sum()


def serve(kind: str, folder: pathlib.Path) -> None:
    """Answers each case read from stdin with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to stderr
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loop = Loop(kind, folder)
    for line in sys.stdin:
        case = json.loads(line)
        print(json.dumps(loop.learn_given(case) if "learn" in case else loop.iteration(case)), file=answers, flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", contender]:
            kind, _, folder = contender.partition("@")
            serve(kind, pathlib.Path(folder))
        case _:
            sys.exit(__doc__)
