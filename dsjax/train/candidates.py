"""Problems, the programs that the model as it is writes for them, and their rewards: what expected risk is made of.

Candidates of a step are drawn anew from the weights that the step will change, by a seed that is made of the run's and
of the step's number, and are kept nowhere. So a run that goes on from a checkpoint makes the same ones again.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np

from dsjax.config import Bounds, NonNegativeFloat, PositiveFloat, PositiveInt, Share, UserError
from dsjax.data.batch import Batch
from dsjax.data.structure.stored import scanner
from dsjax.data.tasks import stream
from dsjax.data.tasks.families import LEVELS
from dsjax.data.tokenizer import Tokenizer
from dsjax.evals.code_scores import sentence_bleu
from dsjax.evals.written_programs import whole
from dsjax.infer.sampling import SamplingConfig
from dsjax.models.decoder import DecoderConfig
from dsjax.rl.completions import docstring, problem_of, program_of
from dsjax.rl.programs import Problem, read_problems
from dsjax.rl.rewards import reward, shares_passed
from dsjax.rl.risk import Candidates, JudgedBatch
from dsjax.rl.rollout import Rollout, Sampler
from dsjax.rl.rows import row_length, written_rows
from dsjax.rl.sandbox import Sandbox
from dsjax.sharding import Rules, host_array_to_global
from dsjax.train.curriculum import CourseConfig, course_order

ROWS = 16  # programs that are written at a time, to be judged


@dataclasses.dataclass(frozen=True)
class RiskConfig:
    """The risk of the model's own programs, beside cross-entropy (:mod:`dsjax.rl.risk`).

    Attributes:
        weight: of the risk in the loss; 0: nothing is sampled, and nothing run.
        every: steps from one with risk to the next.
        prompts: problems of such a step.
        samples: programs for each.
        alpha: sharpness of q.
        per_token: scores are means over the tokens of a program, and not sums.
        bleu: share of the reward that is sentence BLEU beside the known solution; the rest is the share of hidden
            tests that are passed.
        temperature: of sampling.
        max_tokens: of a program.
        problems: a file of them (:func:`dsjax.rl.programs.read_problems`); empty: generated tasks of the training side.
        num_problems: of generated ones, at the most.
    """

    weight: NonNegativeFloat = 1.0
    every: PositiveInt = 2
    prompts: PositiveInt = 8
    samples: Annotated[int, Bounds(ge=2, lt=2**15)] = 4
    alpha: PositiveFloat = 1.0
    per_token: bool = True
    bleu: Share = 0.5
    temperature: PositiveFloat = 1.0
    max_tokens: PositiveInt = 128
    problems: str = ""
    num_problems: PositiveInt = 512


# ---------------------------------------------------------------- problems


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A problem as the model reads it, and how far it is in the course, from 0 to 1."""

    problem: Problem
    tokens: tuple[int, ...]
    stage: float


def prompts_of(cfg: RiskConfig, tokenizer: Tokenizer, seq_len: int, seed: int) -> list[Prompt]:
    """The problems whose programs fit into a row, as documents begin in training.

    Raises:
        UserError: there are none, or too few.
    """
    if cfg.problems:
        found = [(problem, 0.0) for problem in read_problems(cfg.problems)]
    else:
        each = -(-cfg.num_problems // len(LEVELS))
        tasks = [
            itertools.islice(stream("training", levels=(level,), seed=seed), each) for level in LEVELS
        ]  # generators of tasks that no held-out one means the same as
        steps = max(len(LEVELS) - 1, 1)
        found = [(problem_of(task), number / steps) for number, own in enumerate(tasks) for task in own]
    prompts = [Prompt(problem, tokens_of(tokenizer, problem), stage) for problem, stage in found]
    prompts = [prompt for prompt in prompts if len(prompt.tokens) + cfg.max_tokens <= seq_len]
    if not prompts:
        raise UserError(
            f"risk.max_tokens is {cfg.max_tokens} and data.seq_len {seq_len}: of {len(found)} problems none leaves room"
            " for a program; raise data.seq_len, or lower risk.max_tokens"
        )
    return prompts


def tokens_of(tokenizer: Tokenizer, problem: Problem) -> tuple[int, ...]:
    """A problem as a document of training begins: where the prompt ends a token ends, and none is chosen anew."""
    return tokenizer.end_id, *tokenizer.encode(problem.prefix or docstring(problem)).tolist()


def greedy_programs(
    sampler: Sampler, params: Any, tokenizer: Tokenizer, problems: Sequence[Problem], *, max_tokens: int, room: int
) -> Iterator[list[str]]:
    """The likeliest program for each problem, some problems at a time. Of a prompt that leaves no room the end is read.

    Args:
        sampler, params: what writes, and all its variables.
        tokenizer: of the model.
        problems: what is asked.
        max_tokens: of a program.
        room: positions of prompt and program.
    """
    for begin in range(0, len(problems), ROWS):
        some = problems[begin : begin + ROWS]
        prompts = [tokens_of(tokenizer, problem)[-max(room - max_tokens, 1) :] for problem in some]
        found = sampler.sample(
            params, prompts, num_samples=1, max_tokens=max_tokens, seed=0, sampling=SamplingConfig(0.0)
        )
        yield [program_of(problem, own.text, own.ended) for problem, (own,) in zip(some, found, strict=True)]


class Agenda:
    """Which problems a step has: in each epoch in the order of the course, stretched over it.

    Args:
        prompts: all of them.
        cfg, course: see there.
        steps: of an epoch.
        seed: of the order.
    """

    def __init__(self, prompts: Sequence[Prompt], cfg: RiskConfig, course: CourseConfig, steps: int, seed: int):
        self._prompts, self._cfg, self._course, self._steps, self._seed = prompts, cfg, course, steps, seed
        self._stages = [prompt.stage for prompt in prompts]

    def is_due(self, iteration: int) -> bool:
        """Whether the step behind ``iteration`` others has risk."""
        return (iteration + 1) % self._cfg.every == 0

    def prompts(self, iteration: int) -> list[Prompt]:
        """Those of the step behind ``iteration`` others."""
        epoch, step = divmod(iteration, self._steps)
        epoch = min(epoch, self._course.epochs - 1)
        order = course_order(self._stages, self._course.strictness(epoch), self._seed, 2, epoch)
        places = -(-self._steps // self._cfg.every) * self._cfg.prompts  # of an epoch
        first = step // self._cfg.every * self._cfg.prompts
        stretch = max(len(order) / places, 1)
        return [
            self._prompts[order[int(place * stretch) % len(order)]] for place in range(first, first + self._cfg.prompts)
        ]


# ---------------------------------------------------------------- one step


class Judge:
    """Makes of a step's batch one with candidates.

    Args:
        cfg: how many, and what they are worth.
        sampler: writes them.
        sandbox: runs them.
        tokenizer: of the model.
        model: its config.
        length: positions of a row of prompt and program.
        seed: of the run.
    """

    def __init__(
        self,
        cfg: RiskConfig,
        sampler: Sampler,
        sandbox: Sandbox,
        tokenizer: Tokenizer,
        model: DecoderConfig,
        *,
        length: int,
        seed: int,
    ):
        self._cfg, self._sampler, self._sandbox, self._tokenizer = cfg, sampler, sandbox, tokenizer
        self._length, self._seed = length, seed
        self._at_start = None if model.structure is None else scanner(model.structure.language, tokenizer)

    def candidates(self, params: Any, prompts: Sequence[Prompt], iteration: int) -> Candidates:
        """The judged programs for ``prompts`` of the model with these variables; numpy arrays."""
        cfg = self._cfg
        found = self._sampler.sample(
            params,
            [prompt.tokens for prompt in prompts],
            num_samples=cfg.samples,
            max_tokens=cfg.max_tokens,
            seed=int(np.random.SeedSequence((self._seed, iteration)).generate_state(1)[0]),
            sampling=SamplingConfig(temperature=cfg.temperature, top_p=1.0),
        )
        return candidate_rows(
            [prompt.tokens for prompt in prompts],
            found,
            self.rewards(prompts, found),
            length=self._length,
            end_id=self._tokenizer.end_id,
            at_start=self._at_start,
        )

    def rewards(self, prompts: Sequence[Prompt], found: Sequence[Sequence[Rollout]]) -> list[list[float | None]]:
        """From 0 to 1; None: nothing is known."""
        problems = [prompt.problem for prompt, own in zip(prompts, found, strict=True) for _ in own]
        codes = [
            program_of(problem, rollout.text, rollout.ended)
            for problem, rollout in zip(problems, itertools.chain(*found), strict=True)
        ]
        programs = [whole(problem, code) for problem, code in zip(problems, codes, strict=True)]
        likeness = functools.lru_cache(sentence_bleu)
        rewards = [
            reward(passed, code.removeprefix(problem.prefix), problem.solution, likeness, self._cfg.bleu)
            for problem, code, passed in zip(problems, codes, shares_passed(self._sandbox, programs), strict=True)
        ]
        K = self._cfg.samples
        return [rewards[i : i + K] for i in range(0, len(rewards), K)]


def candidate_rows(
    prompts: Sequence[Sequence[int]],
    found: Sequence[Sequence[Rollout]],
    rewards: Sequence[Sequence[float | None]],
    *,
    length: int,
    end_id: int,
    at_start: Any = None,
) -> Candidates:
    """Rollouts and rewards as arrays; of equal texts for a prompt one counts, and none without a reward.

    Args:
        prompts: token ids, the boundary in front included.
        found: K rollouts of each.
        rewards: of each.
        length: of a row; all fit.
        end_id: the boundary, which also ends a text.
        at_start: a scanner, for a model that is told the structure of its text.
    """
    P, K = len(found), len(found[0])
    flat = [rollout for own in found for rollout in own]
    each = [prompt for prompt in prompts for _ in range(K)]
    rows = written_rows(each, flat, length=length, end_id=end_id, at_start=at_start)
    counts, reward_PK = np.zeros((P, K), bool), np.zeros((P, K), np.float32)
    for p in range(P):
        seen = set[tuple[tuple[int, ...], bool]]()
        for k, (rollout, value) in enumerate(zip(found[p], rewards[p], strict=True)):
            learned = rows.learned_NT[p * K + k].any()
            counts[p, k] = value is not None and (rollout.tokens, rollout.ended) not in seen and learned
            reward_PK[p, k] = value or 0.0
            seen.add((rollout.tokens, rollout.ended))
    known = counts.any(axis=1)
    weight = known / max(known.sum(), 1)

    def fold(x: np.ndarray) -> np.ndarray:
        return x.reshape(P, K, *x.shape[1:])

    return Candidates(
        tokens_PKT=fold(rows.tokens_NT),
        targets_PKT=fold(rows.targets_NT),
        learned_PKT=fold(rows.learned_NT),
        ids_PKT=fold(rows.ids_NT),
        reward_PK=reward_PK,
        counts_PK=counts,
        weight_P=weight.astype(np.float32),
        told_PKT=fold(rows.told_NT),
        features_PKTC=None if rows.features_NTC is None else fold(rows.features_NTC),
    )


def with_candidates(batch: Batch, candidates: Candidates, mesh: Any) -> JudgedBatch:
    """A batch on the devices with candidates beside it; every process has all of those."""
    rules, axes = Rules(), ("batch", None, "length")

    def place(x: np.ndarray) -> Any:
        return host_array_to_global(x, mesh, rules.spec(*axes[: 1 if x.ndim < 3 else 3]))

    placed = {f.name: getattr(candidates, f.name) for f in dataclasses.fields(candidates)}
    placed = {name: None if x is None else place(x) for name, x in placed.items()}
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(Batch)}
    return JudgedBatch(**fields, candidates=Candidates(**placed))


def longest_row(prompts: Sequence[Prompt], max_tokens: int, seq_len: int, parts: int) -> int:
    """Positions of a row that any program for the prompts fits into: few distinct ones, and a multiple of ``parts``."""
    return min(row_length(max(len(prompt.tokens) for prompt in prompts) + max_tokens, 64 * parts), seq_len)
