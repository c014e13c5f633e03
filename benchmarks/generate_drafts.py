"""Decoding with drafts beside decoding without, by turns: how many drafts are accepted, and how fast it is.

This file is a config, too: the quickstart's data for a model that has a module of multi-token prediction.

    dsjax train benchmarks/generate_drafts.py --run runs/drafts
    scripts/bench generate --drafts runs/drafts

Each of several held-out documents is continued behind its first tokens, one at a time, greedily and at a temperature.
The tokens of all contenders are compared.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.turns import by_turns, ratio
from configs.quickstart import get_config as quickstart
from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.models.multi_token import MultiTokenConfig
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.train.pretrain import Pretrain

PROMPT, NEW = 64, 128  # tokens
TEMPERATURES = {"greedy": 0.0, "sampled": 0.8}


def get_config() -> Pretrain:
    base = quickstart()
    group = LayerGroup(MLPConfig(d_ff=384), AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=64, qk_norm=True))
    model = DecoderConfig(4096, 128, 6, (group,), tied=True, multi_token=MultiTokenConfig())
    return dataclasses.replace(base, model=model)


@dataclasses.dataclass
class Contender:
    """An engine with a number of drafts; what it made of the documents last."""

    engine: Any
    tokens: list[list[int]] = dataclasses.field(default_factory=list)
    drafts: Any = None

    def decode(self, rows: list[list[int]], temperature: float) -> float:
        """Continues one row after another; seconds, as for ``NEW`` tokens of each behind those of the first step."""
        from dsjax.infer.requests import Drafts, Request
        from dsjax.infer.sampling import SamplingConfig

        self.tokens, self.drafts, seconds = [], Drafts(), 0.0
        for seed, row in enumerate(rows):
            found, begin, first = list[int](), 0.0, 0
            for event in self.engine.stream(Request(row, NEW, SamplingConfig(temperature), seed)):
                found += event.tokens
                self.drafts += event.drafts
                if not first:
                    begin, first = time.perf_counter(), len(found)
            seconds += (time.perf_counter() - begin) * NEW / (NEW - first)
            self.tokens.append(found)
        return seconds


def compare(
    run: pathlib.Path, *, drafts: Sequence[int] = (0, 1, 2, 3), prompts: int = 8, rounds: int = 5
) -> dict[str, Any]:
    """For each way to choose and each number of drafts: tokens a second, accepted share, and the ratio to no drafts.

    Args:
        run: a run of :func:`get_config`, or of another model with modules.
        drafts: how many; the first is what the others are compared with.
        prompts: documents.
        rounds: turns of each contender.
    """
    import dsjax
    from dsjax.data.prepare import prepare
    from dsjax.infer.batching import Engine
    from dsjax.runs import RunFolder, cache_dir

    model, corpus = dsjax.load(run), prepare(RunFolder(run).read_config().data, cache_dir() / "data")
    rows = [document.ids[:PROMPT].tolist() for document in corpus.held_out if len(document.ids) >= PROMPT][:prompts]
    options: dict[str, Any] = {"end_ids": (), "max_length": PROMPT + NEW, "batch_size": 1, "steps": 16}
    figures: dict[str, Any] = {"prompts": len(rows), "prompt": PROMPT, "new": NEW, "rounds": rounds}
    for way, temperature in TEMPERATURES.items():
        made = {f"{n} drafts": Contender(Engine(model.graph, model.params, draft=n, **options)) for n in drafts}
        calls = {name: lambda c=c, t=temperature: c.decode(rows, t) for name, c in made.items()}
        seconds, plain = by_turns(calls, rounds), f"{drafts[0]} drafts"
        figures[way] = {}
        for name, contender in made.items():
            times, interval = ratio(seconds[plain], seconds[name])
            figures[way][name] = {
                "tokens_per_second": len(rows) * NEW / statistics.median(seconds[name]),
                "accepted_share": contender.drafts.share,
                "tokens_per_step": contender.drafts.tokens_per_step or 1.0,
                "equal_tokens": contender.tokens == made[plain].tokens,
                "times_as_fast": times,
                "interval": interval,
            }
    return figures


def table(figures: dict[str, Any]) -> str:
    """The figures for a terminal."""
    lines = [f"{'':20} {'tokens/s':>9} {'accepted':>9} {'tokens/step':>12}  times as fast as without"]
    for way in TEMPERATURES:
        for name, f in figures[way].items():
            low, high = f["interval"]
            lines.append(
                f"{way + ', ' + name:20} {f['tokens_per_second']:9.1f} {f['accepted_share']:9.0%}"
                f" {f['tokens_per_step']:12.2f}  {f['times_as_fast']:.2f} ({low:.2f} to {high:.2f})"
                + ("" if f["equal_tokens"] else "  other tokens!")
            )
    return "\n".join(lines)
