"""GRPO by Tunix's ``GRPOLearner``, for :mod:`benchmarks.r1_speed`: same model, prompts, rewards and optimizer.

Tunix writes by its own sampler (``vanilla``; the others need a TPU or a GPU). Its loss is set to DAPO's clips and mean
over tokens, without KL. It knows no groups that are left out: texts of groups whose rewards are all equal are computed,
and count in the mean, so the loss is smaller by their share. Nor does it learn where a text ends: its sampler takes the
end off. Rows are as long as the longest prompt and text may be. So its update is of the same kind, not the same.

    python -m benchmarks.tunix_grpo serve tunix@FOLDER      # a worker: a case a line, figures back
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from transformers import PreTrainedTokenizerFast
from tunix.models.llama3 import model as llama
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

from dsjax.runtime import keep_freed_memory

PAD_ID = 1  # of a byte that no text has: Tunix tells padding by its id
PROMPT = 64  # positions that prompts are padded to


@dataclasses.dataclass(kw_only=True)
class Config(GRPOConfig):
    """Its loss reads ``epsilon_high`` where there is one."""

    epsilon_high: float = 0.28


class Words:
    """The tokenizer, with the boundary in front of each prompt.

    Tunix adds a first token by itself only if its id is not 0, as that of the boundary may be.
    """

    def __init__(self, file: pathlib.Path, end_id: int):
        self._inner, self._end_id = PreTrainedTokenizerFast(tokenizer_file=str(file)), end_id

    def encode(self, text: str) -> list[int]:
        return [self._end_id, *self._inner.encode(text, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._inner.decode([n for n in map(int, ids) if n != self._end_id])

    def bos_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return self._end_id

    def pad_id(self) -> int:
        return PAD_ID


class Loop:
    """Tunix's loop, which takes its batches from here: one for each case that is read.

    Args:
        folder: with ``hf``, the model, and ``r1.json``, the run's config.
        answers: where figures go.
    """

    def __init__(self, folder: pathlib.Path, answers: Any):
        config = json.loads((folder / "r1.json").read_text(encoding="utf-8"))
        hf = json.loads((folder / "hf" / "config.json").read_text(encoding="utf-8"))
        self.rollout, optim, self._answers = config["rollout"], config["optim"], answers
        self.mark, self.end_id = config["exercises"]["answer_mark"].strip(), hf["eos_token_id"]
        # Tunix 0.1.7's attention takes the default base, whatever the config says.
        llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=hf["rope_theta"])
        shape = llama.ModelConfig(
            num_layers=hf["num_hidden_layers"],
            vocab_size=hf["vocab_size"],
            embed_dim=hf["hidden_size"],
            hidden_dim=hf["intermediate_size"],
            num_heads=hf["num_attention_heads"],
            head_dim=hf["head_dim"],
            num_kv_heads=hf["num_key_value_heads"],
            rope_theta=int(hf["rope_theta"]),
            norm_eps=hf["rms_norm_eps"],
            weight_tying=hf["tie_word_embeddings"],
        )
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
        self.model = create_model_from_safe_tensors(str(folder / "hf"), shape, mesh, dtype=np.float32)
        adam = optax.adamw(optim["lr"], optim["b1"], optim["b2"], optim["eps"], weight_decay=optim["weight_decay"])
        prompts = self.rollout["prompts"]
        cluster = ClusterConfig(
            role_to_mesh=dict.fromkeys((Role.ACTOR, Role.ROLLOUT, Role.REFERENCE), mesh),
            training_config=RLTrainingConfig(
                actor_optimizer=optax.chain(optax.clip_by_global_norm(optim["clip_norm"]), adam),
                eval_every_n_steps=10**9,
                max_steps=10**9,
                mini_batch_size=prompts,
                train_micro_batch_size=prompts,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=self.rollout["max_tokens"],
                max_prompt_length=PROMPT,
                kv_cache_size=PROMPT + self.rollout["max_tokens"],
                temperature=self.rollout["temperature"],
                eos_tokens=[self.end_id],
            ),
        )
        self.words = Words(folder / "hf" / "tokenizer.json", self.end_id)
        self.cluster = RLCluster(actor=self.model, tokenizer=self.words, cluster_config=cluster)
        self._generate, self.cluster.generate = self.cluster.generate, self._timed_generate
        algorithm = Config(num_generations=self.rollout["samples"], beta=0.0, loss_agg_mode="token-mean")
        self.learner = GRPOLearner(rl_cluster=self.cluster, algo_config=algorithm, reward_fns=self._timed_rewards)
        self._seconds, self._found, self._compiled = dict[str, float](), dict[str, Any](), 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def run(self) -> None:
        """Until there are no more cases."""
        self.learner.train(self._cases())

    def _cases(self) -> Iterator[dict[str, np.ndarray]]:
        for line in sys.stdin:
            case, compiled, begin = json.loads(line), self._compiled, time.process_time()
            texts = [self.words.decode(prompt) for prompt in case["prompts"]]
            yield {"prompts": np.array(texts), "answer": np.array(case["answers"])}
            jax.block_until_ready(nnx.state(self.model))  # the loop asks for the next one: this one is learned from
            seconds = self._seconds | {"update": time.process_time() - begin - sum(self._seconds.values())}
            answer = self._found | {"seconds": seconds, "compiled": self._compiled - compiled}
            print(json.dumps(answer), file=self._answers, flush=True)

    def _timed_generate(self, *args: Any, **options: Any) -> Any:
        begin = time.process_time()
        out = self._generate(*args, **options)
        self._seconds["rollout"] = time.process_time() - begin
        ended = [len(tokens) < self.rollout["max_tokens"] for tokens in out.tokens]
        lengths = [len(tokens) + end for tokens, end in zip(out.tokens, ended, strict=True)]
        self._found |= {"texts": len(lengths), "written": sum(lengths), "longest": max(lengths), "ended": ended}
        self._found["learned"] = sum(len(tokens) for tokens in out.tokens)
        return out

    def _timed_rewards(self, prompts: Any, completions: Sequence[str], answer: Any, **_: Any) -> list[float]:
        del prompts
        begin = time.process_time()
        ended = self._found.pop("ended")
        rewards = [float(self._is_right(*one)) for one in zip(completions, ended, answer, strict=True)]
        self._seconds["reward"] = time.process_time() - begin
        self._found["reward"] = float(np.mean(rewards))
        return rewards

    def _is_right(self, text: str, ended: bool, answer: str) -> bool:
        _, found, behind = text.rpartition(self.mark)
        return ended and bool(found) and " ".join(behind.split()) == " ".join(str(answer).split())

    def _hear(self, event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        self._compiled += event == "/jax/core/compile/backend_compile_duration"


def serve(folder: pathlib.Path) -> None:
    """Answers each case read from stdin with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to stderr
    keep_freed_memory()
    Loop(folder, answers).run()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", contender]:
            serve(pathlib.Path(contender.partition("@")[2]))
        case _:
            sys.exit(__doc__)
