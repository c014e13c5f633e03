"""Rollouts: texts of a model that is being trained, by the engine that serves models, on the weights as they are.

A rollout is a function of weights, prompts and seed: nothing else is kept from one to the next. Weights are placed for
inference by reference where they lie right already (on one device they do), and given back before training goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from dsjax.data.tokenizer import Tokenizer
from dsjax.infer.batching import Engine
from dsjax.infer.engine import placed
from dsjax.infer.requests import Request
from dsjax.infer.sampling import SamplingConfig
from dsjax.infer.written_out import is_better, written_out


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A text that a model wrote behind a prompt.

    Attributes:
        tokens: of it, without the one that ended it.
        log_probs: that the model gave each of them, in nats, whatever sampling made of it.
        text: of the tokens.
        ended: by its end token, not by its length.
    """

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    text: str
    ended: bool


class Sampler:
    """Writes texts with weights that change from call to call; compiles once.

    Args:
        graph: the model without its variables.
        tokenizer: of the model.
        mesh: devices.
        num_rows: texts that are worked on at a time; rounded up to a multiple of the devices that rows are cut over.
        max_length: positions of a text with its prompt, at the most.
    """

    def __init__(self, graph: Any, tokenizer: Tokenizer, mesh: Mesh, *, num_rows: int, max_length: int):
        devices = mesh.shape["data"] * mesh.shape["expert"]
        self._graph, self._tokenizer, self._mesh = graph, tokenizer, mesh
        self._num_rows, self._max_length = -(-num_rows // devices) * devices, max_length
        self._engine: Engine | None = None

    def sample(
        self,
        params: Any,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_tokens: int,
        seed: int,
        sampling: SamplingConfig,
    ) -> list[list[Rollout]]:
        """``num_samples`` texts for each prompt.

        Args:
            params: all variables, buffers included; arrays, none of them in few bits.
            prompts: token ids.
            num_samples: of each.
            max_tokens: of a text, at the most.
            seed: another one for each prompt and text is made of it.
            sampling: how tokens are chosen.
        """
        engine = self._with(params)
        numbers = [
            engine.submit(
                Request(
                    prompt,
                    max_tokens,
                    sampling,
                    seed=(seed + place * num_samples) % 2**32,
                    num_samples=num_samples,
                )
            )
            for place, prompt in enumerate(prompts)
        ]
        found = engine.run()
        self._forget(engine)
        return [
            [Rollout(tuple(c.tokens), tuple(c.log_probs), c.text, c.finish == "end") for c in found[number]]
            for number in numbers
        ]

    def _with(self, params: Any) -> Engine:
        """The engine, with these weights."""
        if self._engine is None:
            self._engine = Engine(
                self._graph,
                params,
                end_ids=(self._tokenizer.end_id,),
                max_length=self._max_length,
                batch_size=self._num_rows,
                mesh=self._mesh,
                tokenizer=self._tokenizer,
            )
            return self._engine
        engine = self._engine
        engine.params = placed(self._graph, params, self._mesh, self._num_rows).place(params)
        if is_better(engine.mesh):
            engine.params = written_out(self._graph, engine.params, engine.mesh)[1]
        return engine

    def _forget(self, engine: Engine) -> None:
        """Lets go of the weights, which the next training step changes in place, and of what was computed with them."""
        engine.params = None
        while engine.prefixes.forget():
            pass
