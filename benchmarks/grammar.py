"""Decoding within Python's grammar beside free decoding, on this CPU: the same engine, requests and tokens, in turns.

Tokens per second of wall time, and, which other load on the machine changes less, the CPU time of all threads.

    scripts/bench grammar [--run RUN] [--json FILE] [--rounds N] [--tokens N]

Without a run: random weights in the quickstart's shape and in a 100M Llama's. Such a model says anything, so its texts
are the hardest ones for what is remembered of places; a trained one's come back to the same places. The grammar is
warmed up along files of the standard library. Nothing ends early: end tokens are switched off, so both decode the same
number of tokens.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import time
from typing import Any

import jax
from flax import nnx

from dsjax.config import load_config
from dsjax.data.corpus import stdlib_folder
from dsjax.data.tokenizer import Tokenizer, train_tokenizer
from dsjax.infer.batching import Engine
from dsjax.infer.grammar import PythonGrammar
from dsjax.infer.requests import Event, Request, collected
from dsjax.infer.sampling import SamplingConfig
from dsjax.models.decoder import ComputeConfig, Decoder, DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.mlp import MLPConfig

BATCH, STEPS = 8, 8
PROMPTS = (
    "import os\n\n\ndef read(path):\n",
    "class Node:\n    def __init__(self, value):\n",
    "def fib(n):\n    if n < 2:\n",
    "x = [",
    "for name, value in sorted(",
    "try:\n    import json\nexcept ImportError:\n",
    "@property\ndef size(self):\n",
    "",
)
LLAMA_100M = DecoderConfig(
    32_000, 768, 12, (LayerGroup(MLPConfig(d_ff=2048), AttentionConfig(num_heads=12, num_kv_heads=12, head_dim=64)),)
)


@dataclasses.dataclass
class Contender:
    """A model with its tokenizer and what was found out about the grammar."""

    graph: Any
    params: Any
    tokenizer: Tokenizer
    grammar: PythonGrammar


def random_weights(config: DecoderConfig, compute: ComputeConfig, texts: list[str]) -> Contender:
    """A model that has learned nothing."""
    graph, state = nnx.split(jax.jit(lambda: Decoder(config, compute, rngs=nnx.Rngs(0)))())
    tokenizer = train_tokenizer(texts, config.vocab_size)
    return Contender(graph, nnx.to_pure_dict(state), tokenizer, PythonGrammar(tokenizer, finish=False))


def trained(run: pathlib.Path) -> Contender:
    """The model of a run."""
    from dsjax.loaded import load

    model = load(run)
    assert model.tokenizer is not None
    return Contender(model.graph, model.params, model.tokenizer, PythonGrammar(model.tokenizer, finish=False))


def compare(made: Contender, *, rounds: int, tokens: int) -> dict[str, Any]:
    """Tokens per second of both, how many masks were remembered, and what a token costs the host."""
    engine = Engine(
        made.graph, made.params, end_ids=(), max_length=tokens + 64, batch_size=BATCH, steps=STEPS,
        tokenizer=made.tokenizer,
    )  # fmt: skip

    def turn(number: int, grammar: PythonGrammar | None) -> tuple[float, float, list[list[int]]]:
        for prompt in PROMPTS:
            ids = [made.tokenizer.end_id, *made.tokenizer.encode(prompt).tolist()]
            engine.submit(Request(ids, tokens, SamplingConfig(), seed=1000 * number, grammar=grammar))
        events: list[Event] = []
        while any(r is None or not r.decodes for r in engine.rows):
            events += engine.step()  # the prompts
        first = sum(r.num_new for r in engine.running())
        begun, cpu_begun = time.perf_counter(), time.process_time()
        while engine.busy:
            events += engine.step()
        seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu_begun
        texts = [sample.tokens for samples in collected(events).values() for sample in samples]
        made_here = BATCH * tokens - first
        return made_here / seconds, 1e3 * cpu_seconds * BATCH / made_here, texts

    speeds: dict[str, list[float]] = {"free": [], "grammar": []}
    cpu_ms: dict[str, list[float]] = {"free": [], "grammar": []}
    masks, begun = made.grammar.masks, time.perf_counter()
    files = sorted(path for path in stdlib_folder().glob("*.py") if 2_000 < path.stat().st_size < 30_000)[::2]
    made.grammar.warm_up(path.read_text(encoding="utf-8") for path in files)
    warm_up = time.perf_counter() - begun
    for number in range(rounds + 2):
        masks.asked = masks.walks = 0
        for name, grammar in (("free", None), ("grammar", made.grammar)):
            speed, cpu, texts = turn(number, grammar)
            if number >= 2:  # the first turns compile, and meet what comes back later
                speeds[name].append(speed)
                cpu_ms[name].append(cpu)
    ratios = [b / a for a, b in zip(speeds["free"], speeds["grammar"], strict=True)]
    return {
        "tokens_per_second": {name: statistics.median(found) for name, found in speeds.items()},
        "cpu_ms_per_step": {name: statistics.median(found) for name, found in cpu_ms.items()},
        "grammar_over_free": statistics.median(ratios),
        "ratios": ratios,
        "warm_up_s": warm_up,
        "masks_remembered": 1 - masks.walks / masks.asked,
        "host_us_per_token": host_seconds(made.grammar, made.tokenizer, texts) * 1e6,
    }


def host_seconds(grammar: PythonGrammar, tokenizer: Tokenizer, texts: list[list[int]]) -> float:
    """Seconds for the mask and the place of a token, of texts that were met before."""
    seconds = []
    for _ in range(3):
        number, begun = 0, time.perf_counter()
        for prompt, text in zip(PROMPTS, texts, strict=True):
            constraint = grammar.begin(tokenizer.encode(prompt).tolist(), [])
            for token in text:
                constraint.row(10**6)
                constraint.add(token)
                number += 1
        seconds.append((time.perf_counter() - begun) / number)
    return min(seconds)


def compare_all(run: str, *, rounds: int, tokens: int) -> dict[str, Any]:
    """Of each model."""
    if run:
        return {pathlib.Path(run).name: compare(trained(pathlib.Path(run)), rounds=rounds, tokens=tokens)}
    texts = [path.read_text(encoding="utf-8") for path in sorted(stdlib_folder().rglob("*.py"))[:400]]
    quick = load_config("configs/quickstart.py")
    shapes = {"quickstart": (quick.model, quick.compute), "llama_100m": (LLAMA_100M, ComputeConfig())}
    return {
        name: compare(random_weights(*shape, texts), rounds=rounds, tokens=tokens) for name, shape in shapes.items()
    }
