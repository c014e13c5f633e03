"""One iteration of reinforcement learning: what the model writes now, what it is worth, and the updates made of it.

    exercises -> K texts each -> rewards -> advantages -> E epochs of M minibatches

All of it lies between two checkpoints, so nothing of it is in one: a run that goes on from the last writes the same
texts again, from the same weights and seeds.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsjax import hosts
from dsjax.background import InBackground
from dsjax.config import UserError
from dsjax.data.structure.stored import scanner
from dsjax.data.tokenizer import Tokenizer
from dsjax.evals.solved import prompt_tokens
from dsjax.infer.sampling import SamplingConfig
from dsjax.nn.router import agreement
from dsjax.rl.advantages import advantages
from dsjax.rl.curriculum import Choice
from dsjax.rl.experience import Experience, experience_of, minibatch, place_experience
from dsjax.rl.log_probs import log_probs_and_entropies
from dsjax.rl.packing import packing_of
from dsjax.rl.policy import correction, explained_variance, kl_estimate
from dsjax.rl.rollout import Sampler
from dsjax.rl.rows import WrittenRows, row_length, written_rows
from dsjax.sharding import Rules, replicated, training_rules, use_mesh
from dsjax.train.course import Course, Worth, Written, metrics_of
from dsjax.train.loop import Counters
from dsjax.train.step import TrainState
from dsjax.train.writing import leaves_room

TRIES = 256  # numbers behind that of an exercise whose prompt is too long
LENGTH_STEP = 32  # of arrays of one text a row, whose shapes programs are compiled for


@dataclasses.dataclass(frozen=True)
class Updates:
    """Minibatches on the devices, in the order in which the model learns from them, and metrics of the iteration."""

    minibatches: tuple[Experience, ...]
    metrics: dict[str, float]


def each_update(step: Any) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """A step of the loop that makes all updates of an iteration, by the step of one.

    Metrics are means over the updates that had tokens to learn from; ``tokens`` is their sum, and ``finite`` says so
    of all. What the rollouts were like is added. The gap between what the engine said of a text and what the trainer
    says is that of the first update: behind it the model is another.
    """

    def run(state: Any, updates: Any, total_steps: Any, factor: float | None = None) -> Any:
        found = list[dict[str, Any]]()
        for experience in updates.minibatches:
            state, metrics = step(state, experience, total_steps * len(updates.minibatches), factor)
            found.append(metrics)
        values = jax.device_get(found)
        taught = [v for v in values if v["tokens"]]
        merged = {name: np.mean([v[name] for v in taught or values], axis=0) for name in values[0]}
        merged["tokens"] = np.sum([v["tokens"] for v in values])
        merged["finite"] = np.min([v["finite"] for v in values])
        if not taught:  # of no token nothing is known, which is not 0
            return state, {k: x for k, x in merged.items() if not k.startswith(("policy/", "value/"))} | updates.metrics
        merged |= {f"rl/{name}": merged[f"policy/{name}"] for name in ("entropy", "kl_old")}
        merged["rl/log_prob_gap"] = taught[0]["policy/log_prob_gap"]
        if "value/return" in merged:
            merged["rl/explained_variance"] = explained_variance(merged)
        return state, merged | updates.metrics

    return run


def split_rows(num_rows: int, epochs: int, minibatches: int, seed: Sequence[int]) -> list[np.ndarray]:
    """Which rows each update has: in each epoch every row once, in an order of its own."""
    parts = []
    for epoch in range(epochs):
        draws = np.random.Philox(np.random.SeedSequence((*seed, epoch))).random_raw(num_rows)
        parts += np.split(np.argsort(draws, kind="stable"), minibatches)
    return parts


# ---------------------------------------------------------------- what is known of texts


class Scorer:
    """What a model says of texts that are there: one pass over each row, no gradient.

    Args:
        graph: the model without its variables.
        mesh: devices.
        rules: of training.
        cfg: the config of the run.
        end_id: the boundary.
    """

    def __init__(self, graph: Any, mesh: Mesh, rules: Rules, cfg: Any, end_id: int):
        temperature, replay = cfg.rollout.temperature, cfg.rollout.replay

        def run(variables: Any, rows: Experience) -> dict[str, jax.Array]:
            with use_mesh(mesh, rules):
                model = nnx.merge(graph, variables)
                told = rows.experts_BTLK
                given = {} if told is None else {"tell_experts": True} | ({"experts_BTLK": told} if replay else {})
                out = model(rows.tokens_BT, rows.documents, features_BTC=rows.features_BTC, **given)
                log_prob_BT, _ = log_probs_and_entropies(model, out, rows.targets_BT, temperature=temperature)
                found = {"log_prob": log_prob_BT}
                if model.cfg.values != "none":
                    found["value"] = model.values(out, rows.tokens_BT, rows.documents, rows.features_BTC)
                if told is not None:
                    found["experts"] = out.own_experts_BTLK
            return found

        self._run, self._mesh = jax.jit(run, out_shardings=replicated(mesh)), mesh
        self._cfg, self._end_id = cfg, end_id

    def __call__(self, variables: Any, texts: Experience) -> dict[str, np.ndarray]:
        """``log_prob`` and, of a model with values, ``value``: (N, T); ``experts``: what routers would choose.

        Rows are looked at as many at a time as an update has.
        """
        updates, cfg = self._cfg.update.minibatches, self._cfg
        packing = packing_of(texts, cfg.data.seq_len, updates * row_devices(cfg, self._mesh), cfg.model.turn)
        step = packing.num_rows // updates
        rows, found = packing.experience(texts, self._end_id), list[dict[str, np.ndarray]]()
        for first in range(0, packing.num_rows, step):
            some = place_experience(jax.tree.map(lambda x, at=first: x[at : at + step], rows), self._mesh)
            found.append(jax.device_get(self._run(variables, some)))
        length = texts.tokens_BT.shape[1]
        return {name: packing.unpacked(np.concatenate([part[name] for part in found]), length) for name in found[0]}


def row_devices(cfg: Any, mesh: Mesh) -> int:
    """What the number of an update's rows is a multiple of: devices that rows are cut over, and micro-batches."""
    return cfg.train.accumulate * math.prod(mesh.shape[axis] for axis in training_rules(cfg.mesh).batch)


# ---------------------------------------------------------------- an iteration


class Practice:
    """Makes the updates of an iteration.

    Args:
        cfg: the config of the run, a :class:`dsjax.train.r1.R1`.
        course: which exercises come next, and what else is remembered on the host.
        sampler: writes texts.
        judge: what texts are worth.
        scorer: says what a model makes of texts that are there.
        tokenizer: of the model.
        mesh: devices that learn.
        reference: (state) -> all variables of the policy to stay near; None: there is none.
        variables: (state) -> all variables that it writes with.
    """

    def __init__(
        self,
        cfg: Any,
        course: Course,
        sampler: Sampler,
        judge: Callable[[Written], Worth],
        scorer: Scorer,
        tokenizer: Tokenizer,
        mesh: Mesh,
        reference: Callable[[TrainState], Any] | None,
        variables: Callable[[TrainState], Any],
    ):
        self._cfg, self._course, self._sampler, self._judge, self._scorer = cfg, course, sampler, judge, scorer
        self._tokenizer, self._mesh, self._reference, self._variables = tokenizer, mesh, reference, variables
        structure = cfg.model.structure
        self._at_start = None if structure is None else scanner(structure.language, tokenizer)

    def __call__(self, state: TrainState, choices: Sequence[Choice], counters: Counters) -> Updates:
        """The updates made of some exercises; the course is told how they went."""
        watch = Stopwatch()
        jax.block_until_ready(state.step)
        variables = self._variables(state)
        written, worth = self._groups(variables, choices, counters, watch)
        if hosts.count() > 1:  # the same programs in the same order on all of them: not from two threads
            self._course.wait()
            watch.lap("rollout")
        reference = None if self._reference is None else self._reference(state)
        experience, metrics = self._experience(variables, reference, written, worth)
        watch.lap("score")
        update, rollout, seed = self._cfg.update, self._cfg.rollout, (self._cfg.train.seed, counters.iteration)
        parts = split_rows(len(experience.tokens_BT), update.epochs, update.minibatches, seed)
        updates, devices, end_id = list[Experience](), row_devices(self._cfg, self._mesh), self._tokenizer.end_id
        for texts in parts:
            some = minibatch(experience, texts, self._cfg.policy.aggregate, rollout.max_tokens)
            packing = packing_of(some, self._cfg.data.seq_len, devices, self._cfg.model.turn)
            updates.append(place_experience(packing.experience(some, end_id), self._mesh))
        metrics |= metrics_of(written, worth) | self._course.metrics() | watch.metrics()
        return Updates(tuple(updates), metrics)

    # ------------------------------------------------------------ texts

    def _groups(
        self, variables: Any, choices: Sequence[Choice], counters: Counters, watch: Stopwatch
    ) -> tuple[Written, Worth]:
        """What was written and what it is worth; with further rounds, groups that teach before those that do not."""
        cfg, iteration = self._cfg.rollout, counters.iteration
        write = self._ahead if cfg.one_step_off else self._write
        written, worth = self._judged(write(variables, choices, iteration, 0), watch)
        for number in range(1, 1 + cfg.more_rounds):
            if worth.alive_P.sum() >= len(choices):
                break
            further, own = self._judged(self._write(variables, next(self._course), iteration, number), watch)
            written, worth = written + further, worth + own
        chosen = np.argsort(~worth.alive_P, kind="stable")[: len(choices)].tolist()
        return written.some(chosen), worth.some(chosen)

    def _judged(self, written: Written, watch: Stopwatch) -> tuple[Written, Worth]:
        watch.lap("rollout")
        worth = self._judge(written)
        self._course.scored(written, worth)
        watch.lap("reward")
        return written, worth

    def _ahead(self, variables: Any, choices: Sequence[Choice], iteration: int, number: int) -> Written:
        """What was written for this iteration while the one before was learned from; and begins the next one's.

        The first one's are written now. The weights are copied, since the update changes them in place. Several
        processes write while rewards are judged, and learn behind that.
        """
        if self._course.ahead is None:
            written, choices = self._write(variables, choices, iteration, number), next(self._course)
        else:
            written = self._course.ahead()
        kept = jax.tree.map(jnp.copy, variables)
        self._course.ahead = InBackground(lambda: self._write(kept, choices, iteration + 1, number)).result
        return written

    def _write(self, variables: Any, choices: Sequence[Choice], *number: int) -> Written:
        cfg = self._cfg.rollout
        choices = [with_room(choice, self._course, self._tokenizer, self._cfg) for choice in choices]
        exercises = [self._course.exercise(choice) for choice in choices]
        rollouts = self._sampler.sample(
            variables,
            [prompt_tokens(self._tokenizer, exercise) for exercise in exercises],
            num_samples=cfg.samples,
            max_tokens=cfg.max_tokens,
            seed=int(np.random.SeedSequence((self._cfg.train.seed, *number)).generate_state(1)[0]),
            sampling=SamplingConfig(temperature=cfg.temperature, top_p=1.0),
            stop=cfg.stop,
        )
        return Written(tuple(choices), tuple(exercises), tuple(map(tuple, rollouts)))

    # ------------------------------------------------------------ arrays

    def _experience(
        self, variables: Any, reference: Any, written: Written, worth: Worth
    ) -> tuple[Experience, dict[str, float]]:
        """Rows of all texts with their advantages, and metrics of what models say of them."""
        cfg, policy = self._cfg.rollout, self._cfg.policy
        prompts = [prompt_tokens(self._tokenizer, e) for e in written.exercises for _ in range(cfg.samples)]
        rollouts = [text for own in written.rollouts for text in own]
        longest = max(len(p) + len(r.tokens) for p, r in zip(prompts, rollouts, strict=True))
        length, end_id = row_length(longest, LENGTH_STEP), self._tokenizer.end_id
        rows = written_rows(prompts, rollouts, length=length, end_id=end_id, at_start=self._at_start)
        known_N = np.isfinite(worth.total_PK).reshape(-1)
        plain = experience_of(rows, known_N, np.zeros_like(rows.told_NT))
        scores: dict[str, np.ndarray] = {}
        metrics, further = dict[str, float](), dict[str, Any]()
        if cfg.rescore or self._cfg.advantage.kind == "gae" or (rows.experts_NTLK is not None):
            scores = self._scorer(variables, plain)
            metrics |= compared(rows, scores, self._cfg.rollout.temperature)
        old_NT = scores["log_prob"] if cfg.rescore else rows.told_NT
        if cfg.rescore and cfg.correction_limit:
            further["correction_BT"] = correction(old_NT, rows.told_NT, cfg.correction_limit)
        penalty_NT = None
        if reference is not None:
            reference_NT = self._scorer(reference, plain)["log_prob"]
            further["reference_log_prob_BT"] = reference_NT
            mask_NT = (rows.learned_NT > 0) & known_N[:, None]
            metrics["rl/kl"] = mean_over(
                mask_NT, np.asarray(kl_estimate("k3", jnp.asarray(old_NT), jnp.asarray(reference_NT)))
            )
            self._course.adapt_kl(metrics["rl/kl"])
            if policy.kl_in == "reward":
                penalty_NT = self._course.kl_coef * (old_NT - reference_NT)
            further["kl_coef_B"] = np.full(len(known_N), self._course.kl_coef, np.float32)
        found = advantages(
            self._cfg.advantage,
            worth.total_PK,
            rows.learned_NT,
            penalty_BT=penalty_NT,
            value_BT=scores.get("value"),
        )
        if found.return_BT is not None:
            further |= {"return_BT": found.return_BT, "old_value_BT": scores["value"]}
        counts_N = np.asarray(found.counts_B)
        if cfg.drop_dead and self._cfg.advantage.kind != "gae":
            counts_N = counts_N & np.repeat(worth.alive_P, cfg.samples)
        if not cfg.replay:
            rows = dataclasses.replace(rows, experts_NTLK=None)
        return experience_of(rows, counts_N, found.advantage_BT, np.nan_to_num(old_NT), **further), metrics


def with_room(choice: Choice, course: Course, tokenizer: Tokenizer, cfg: Any) -> Choice:
    """What was chosen, or the next one of its arm whose prompt leaves room for a text.

    Args:
        cfg: the config of the run, a :class:`dsjax.train.r1.R1`.

    Raises:
        UserError: none of ``TRIES`` does.
    """
    for number in range(choice.number, choice.number + TRIES):
        candidate = choice._replace(number=number)
        if leaves_room(course.exercise(candidate), tokenizer, cfg.rollout, cfg.data.seq_len):
            return candidate
    raise UserError(
        f"data.seq_len is {cfg.data.seq_len}; of {TRIES} prompts of {choice.arm} none leaves room for"
        f" rollout.max_tokens, {cfg.rollout.max_tokens}: raise it"
    )


def mean_over(mask: np.ndarray, x: np.ndarray) -> float:
    """The mean where ``mask`` holds; NaN where it holds nowhere."""
    return float(x[mask].mean()) if mask.any() else math.nan


def compared(rows: WrittenRows, scores: Mapping[str, np.ndarray], temperature: float) -> dict[str, float]:
    """How far the trainer is from the engine: nats a token, and which share of router decisions is the same.

    The engine tells log-probabilities at temperature 1; with another nothing is known of the first (NaN).
    """
    said_NT = (rows.learned_NT > 0) & np.isfinite(rows.told_NT) & (temperature == 1)
    metrics = {"rl/log_prob_gap": mean_over(said_NT, np.abs(scores["log_prob"] - np.nan_to_num(rows.told_NT)))}
    if rows.experts_NTLK is not None:
        metrics["rl/router_agreement"] = float(agreement(rows.experts_NTLK, scores["experts"], rows.ids_NT > 0))
    return metrics


class Stopwatch:
    """Seconds of the parts of an iteration."""

    def __init__(self) -> None:
        self._last, self._seconds = time.perf_counter(), dict[str, float]()

    def lap(self, name: str) -> None:
        """Since the last lap it was this."""
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def metrics(self) -> dict[str, float]:
        """Seconds by part."""
        return {f"rl/seconds_{name}": seconds for name, seconds in self._seconds.items()}
