"""Rollouts: texts of a model that is being trained, by the engine that serves models, on the weights as they are.

A rollout is a function of weights, prompts and seed: nothing else is kept from one to the next. Weights are placed for
inference by reference where they lie right already (on one device they do), and given back before training goes on.
Which experts a router chose can be told, so that training sends each token there again (docs/routing.md).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from jax.sharding import Mesh

from dsjax import hosts
from dsjax.config import UserError
from dsjax.data.tokenizer import Tokenizer
from dsjax.infer.batching import Engine
from dsjax.infer.requests import Completion, Event, Request, collected
from dsjax.infer.sampling import SamplingConfig

STEPS = 4  # tokens decoded at a time: a row whose text ends in between waits for the next one


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A text that a model wrote behind a prompt.

    Attributes:
        tokens: of it, without the one that ended it.
        log_probs: that the model gave each of them, and the one that ended it, in nats, whatever sampling made of it.
        text: of the tokens.
        ended: by its end token, not by its length or by a text that was to end it.
        experts: router decisions at each position of prompt and text, (positions, L, K), as ``experts_BTLK`` of
            :class:`dsjax.models.output.DecoderOutput`; None: they were not asked for, or there are none.
        stopped: by a text that was to end it, which ``text`` is without, and ``tokens`` are not.
    """

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    text: str
    ended: bool
    experts: np.ndarray | None = dataclasses.field(default=None, compare=False)
    stopped: bool = False


class Sampler:
    """Writes texts with weights that change from call to call; compiles once.

    Args:
        graph: the model without its variables. What makes its values is neither placed nor computed.
        tokenizer: of the model.
        mesh: devices that write, which may be cut in another way than those that train: weights that lie elsewhere are
            sent, in the type that they are used in; those that lie right are not copied.
        num_rows: texts that are worked on at a time; rounded up to a multiple of the devices that rows are cut over.
        max_length: positions of a text with its prompt, at the most.
        tell_experts: tell which experts each position went to, for training to send it there again.
    """

    def __init__(
        self,
        graph: Any,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        num_rows: int,
        max_length: int,
        tell_experts: bool = False,
    ):
        devices = mesh.shape["data"] * mesh.shape["expert"]
        self._graph, self._tokenizer, self._mesh = graph, tokenizer, mesh
        self._num_rows, self._max_length = -(-num_rows // devices) * devices, max_length
        self._tell_experts, self._engine = tell_experts, cast(Engine | None, None)

    def sample(
        self,
        params: Any,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_tokens: int,
        seed: int,
        sampling: SamplingConfig,
        stop: Sequence[str] = (),
    ) -> list[list[Rollout]]:
        """``num_samples`` texts for each prompt.

        Args:
            params: all variables, buffers included; arrays, none of them in few bits.
            prompts: token ids.
            num_samples: of each.
            max_tokens: of a text, at the most; there is room for so many behind every prompt.
            seed: another one for each prompt and text is made of it.
            sampling: how tokens are chosen.
            stop: texts that end one.

        Raises:
            UserError: a prompt is empty or too long, or a count is below 1; nothing is written then. Or processes have
                come to different tokens.
        """
        requests = [
            Request(
                prompt,
                max_tokens,
                sampling,
                seed=(seed + place * num_samples) % 2**32,
                num_samples=num_samples,
                stop=stop,
            )
            for place, prompt in enumerate(prompts)
        ]
        for place, request in enumerate(requests):  # all of them before the first is submitted
            request.check(self._max_length, 0, has_tokenizer=True)
            if (length := len(request.prompt)) + max_tokens > self._max_length:
                raise UserError(
                    f"prompt {place} has {length} tokens, and max_tokens is {max_tokens}; a text with its prompt has at"
                    f" most {self._max_length} positions"
                )
        engine, self._engine = self._with(params), None  # it stays away if it fails: with work left undone
        numbers = [engine.submit(request) for request in requests]
        events = list[Event]()
        while engine.busy:
            hosts.beat()
            events += engine.step()
        engine.forget()
        self._engine, found = engine, collected(events)
        written = [[rollout_of(completion) for completion in found[number]] for number in numbers]
        if hosts.count() > 1:
            hosts.same("texts", digest_of(written))
        return written

    def _with(self, params: Any) -> Engine:
        """The engine, with these weights."""
        if self._engine is not None:
            self._engine.give(params)
            return self._engine
        return Engine(
            self._graph,
            params,
            end_ids=(self._tokenizer.end_id,),
            max_length=self._max_length,
            batch_size=self._num_rows,
            mesh=self._mesh,
            tokenizer=self._tokenizer,
            tell_experts=self._tell_experts,
            streams=False,
            steps=STEPS,
        )


def digest_of(written: Sequence[Sequence[Rollout]]) -> str:
    """Of all tokens."""
    return hashlib.sha256(repr([[text.tokens for text in own] for own in written]).encode()).hexdigest()


def rollout_of(completion: Completion) -> Rollout:
    """What an engine has written, with its end."""
    end = completion.end_log_prob
    log_probs = completion.log_probs if end is None else [*completion.log_probs, end]
    ended, stopped = completion.finish == "end", completion.finish == "stop"
    words = (tuple(completion.tokens), tuple(log_probs), completion.text)
    return Rollout(*words, ended, completion.experts, stopped)
