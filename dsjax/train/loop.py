"""The training loop: steps, logs, checkpoints, held-out evaluation; skips, roll-backs, interruption."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax import hosts
from dsjax.checkpoint import Checkpoints
from dsjax.config import UserError
from dsjax.metrics import MetricsLog, Progress, plot_loss, told_of, write_atomic
from dsjax.nn.moe import DynamicCapacity
from dsjax.runs import RunFolder
from dsjax.train.alarms import CollapseAlarm
from dsjax.train.capacity import Controller
from dsjax.train.peak import matmul_peak_flops
from dsjax.train.step import Trainer, TrainState

BAD_STEPS_IN_A_ROW = 3  # then the state goes back to the last checkpoint
MAX_ROLLBACKS = 3  # then the run stops

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


@dataclasses.dataclass
class Counters:
    """Where the run is: plain data, saved with every checkpoint.

    Attributes:
        iteration: batches taken, skipped ones included.
        total_steps: batches planned.
        tokens_seen: trained on.
        skipped: steps whose loss or gradient was not finite.
        bad_in_a_row: such steps since the last good one.
        rollbacks: returns to a checkpoint.
        asked_steps: ``train.steps`` when the plan was made.
        asked_minutes: ``train.max_minutes`` then; None: not known.
        capacity: of the :class:`~dsjax.train.capacity.Controller`.
        alarm: of the :class:`~dsjax.train.alarms.CollapseAlarm`.
    """

    iteration: int = 0
    total_steps: int = 0
    asked_steps: int = 0
    asked_minutes: float | None = None
    bad_in_a_row: int = 0
    tokens_seen: int = 0
    skipped: int = 0
    rollbacks: int = 0
    capacity: dict[str, Any] = dataclasses.field(default_factory=dict)
    alarm: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Job:
    """What a recipe hands to the loop.

    Attributes:
        trainer: the step functions.
        step: (state, batch, total steps, capacity factor) -> (state, metrics), compiled.
        place: puts this process's part of a batch on the devices.
        batches: iterator with ``get_state`` and ``set_state``.
        checkpoints: of the run.
        evaluate: (variables, stopped) -> held-out metrics; none if ``stopped()`` became true on the way.
        flops_per_token: for the MFU.
        begin: ``time.perf_counter()`` when the command began.
        data_changes: which files of the data are others than before, should they be asked for.
        capacity: what chooses the capacity factor; none: it is fixed.
        start: gives a new state the weights that training begins with; none: those that it has.
        frozen: weights that are not trained, and not in checkpoints; empty: there are none.
        place_experts: gives the busiest experts their further places, for the loads that the state holds; none: there
            are no such places.
        experts: (number of experts, experts of a token) of each layer group that has some.
        complete: (state, batch, counters) -> the batch that is stepped on: with what depends on the model as it is.
        observe: is told the numbers of each good step, once and in order; what there is to say about them.
        summary: the numbers of a step in some words, beside the progress.
        select: is shown the records of ``metrics.jsonl`` whenever one that was evaluated has been saved, and keeps the
            best of those; none: what is evaluated is not saved for that.
    """

    trainer: Trainer
    step: Callable[[TrainState, Any, Any, float | None], tuple[TrainState, dict[str, Any]]]
    place: Callable[[Any], Any]
    batches: Any
    checkpoints: Checkpoints
    evaluate: Callable[[Any, Callable[[], bool]], dict[str, float]]
    flops_per_token: float
    begin: float
    data_changes: Callable[[], str] = lambda: ""
    capacity: DynamicCapacity | None = None
    start: Callable[[TrainState], TrainState] | None = None
    frozen: Callable[[], Any] = dict
    place_experts: Callable[[TrainState], TrainState] | None = None
    experts: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    complete: Callable[[TrainState, Any, Counters], Any] | None = None
    observe: Callable[[dict[str, Any]], list[str]] = lambda metrics: []
    summary: Callable[[dict[str, Any]], str] = lambda values: f"loss {values['loss']:.3f}"
    select: Callable[[list[dict[str, Any]]], None] | None = None


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to save and stop.

    After it a second Ctrl-C ends the process at once, in whatever it is; a second SIGTERM (launchers repeat theirs)
    changes nothing. With several processes, the signal of one stops all of them at the same step.

    Attributes:
        received: the signal that came, if it came to this process.
        stopping: whether all processes are to stop now.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.stopping = False
        self._agreement = hosts.Agreement()
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # Not by print: the signal may have come in the middle of one.
        os.write(2, f"\n{self.received}: saving after this step; Ctrl-C stops at once\n".encode())

    def ask(self) -> bool:
        """Whether to stop, the same on all processes; each of them calls it as often as the others."""
        self.stopping = self._agreement.ask(self.received is not None) or self.stopping
        return self.stopping

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def train(config: Any, run: RunFolder, job: Job, state: TrainState, counters: Counters, *, quiet: bool = False) -> int:
    """Runs until the planned steps are done, a signal asks to stop, or the numbers stay bad.

    Returns:
        The exit code: 0 done, 1 stopped by non-finite numbers, 130 interrupted and saved.
    """
    first = hosts.index() == 0
    log = MetricsLog(run.path, resume_step=counters.iteration, tensorboard=config.log.tensorboard, write=first)
    progress = Progress(counters.total_steps, counters.iteration, quiet=quiet)
    if counters.iteration:
        progress.note(f"resumed at step {counters.iteration} of {counters.total_steps}")
    if first:
        with told_of(run.failure):
            run.failure.unlink(missing_ok=True)
    clock, guard = Clock(config, job, log), Guard(job, config.train.seed, counters, progress.note)
    every, code = config.train, 0
    try:
        with StopSignal() as stop:
            if job.select is not None:
                catch_up(job, state, counters, clock, log, progress, stop)
            while counters.iteration < counters.total_steps and not stop.stopping:
                batch = job.place(next(job.batches))
                hosts.beat(counters.iteration)
                if job.complete is not None:
                    batch = job.complete(state, batch, counters)
                state, metrics = guard.step(state, counters, batch)
                if job.place_experts is not None and counters.iteration % every.place_every == 0:
                    state = job.place_experts(state)
                stop.ask()
                last = counters.iteration == counters.total_steps
                if not clock.running or last or counters.iteration % every.log_every == 0:
                    state = guard.settle(state, counters)
                    clock.log(metrics, counters, progress)
                if clock.evaluation_is_due(counters) and not stop.stopping:
                    if job.select is not None:  # what is judged is what is saved
                        state = guard.settle(state, counters)
                    clock.evaluate(state, counters, progress, stop)
                    if job.select is not None and not stop.stopping:
                        save_and_select(job, state, counters, log)
                if counters.iteration % config.checkpoint.every == 0 and job.checkpoints.newest != counters.iteration:
                    state = guard.settle(state, counters)
                    save(job, state, counters)
                job.checkpoints.check()
            state = guard.settle(state, counters)
            if job.checkpoints.newest != counters.iteration:
                save(job, state, counters)
            if first:
                plot_loss(log.records, run.path / "loss.png", title=run.name)  # while the checkpoint is written
            job.checkpoints.wait()
        if counters.iteration < counters.total_steps:
            why = stop.received or "another process was asked to stop"
            progress.note(f"{why}: saved at step {counters.iteration}; the same command goes on from there")
            code = EXIT_INTERRUPTED
        else:
            progress.note(f"done: {counters.iteration} steps, {counters.tokens_seen:,} tokens, in {run.path}")
    except NonFinite as error:
        if first:
            write_atomic(run.failure, json.dumps(error.report, indent=1) + "\n")
        progress.note(f"stopped: {error} (see {run.failure}; the last good checkpoint is kept)")
        code = EXIT_FAILED
    finally:
        progress.close()
        log.close()
    return code


def restore_or_init(config: Any, job: Job) -> tuple[TrainState, Counters]:
    """The latest checkpoint's state and position in the data, else new ones.

    Raises:
        UserError: the checkpoint is of other data, does not fit the model, or lies behind the steps asked for.
    """
    asked, minutes = config.train.steps, config.train.max_minutes
    if job.checkpoints.empty():
        counters = Counters(total_steps=asked, asked_steps=asked, asked_minutes=minutes)
        return new_state(job, config.train.seed), counters
    state, host, _ = job.checkpoints.restore(job.trainer.shapes.moving)
    job.batches.set_state(host["data"], changes=job.data_changes())
    counters = Counters(**host["loop"])
    if counters.iteration > asked:
        raise UserError(
            f"train.steps is {asked}; the run in {job.checkpoints.folder.parent} is at step {counters.iteration}"
        )
    before = counters.asked_minutes
    more_time = before is not None and (minutes or math.inf) > (before or math.inf)
    if counters.asked_steps != asked or more_time:  # the user asks for another length
        counters.total_steps = asked
    counters.asked_steps, counters.asked_minutes = asked, minutes
    return dataclasses.replace(state, frozen=job.frozen()), counters


def new_state(job: Job, seed: int) -> TrainState:
    """The state that training begins with."""
    number: Any = np.uint32(seed)  # a seed may not fit int32
    state = job.trainer.init(number)
    if job.start is not None:
        state = job.start(state)
    return dataclasses.replace(state, frozen=job.frozen())


def save(job: Job, state: TrainState, counters: Counters) -> None:
    """One commit of everything."""
    host = {"data": job.batches.get_state(), "loop": dataclasses.asdict(counters)}
    job.checkpoints.save(counters.iteration, state.moving, host)


def save_and_select(job: Job, state: TrainState, counters: Counters, log: MetricsLog) -> None:
    """Saves what was just evaluated, and has the best of what was kept."""
    assert job.select is not None
    save(job, state, counters)
    job.checkpoints.wait()
    job.select(log.records)


def catch_up(
    job: Job, state: TrainState, counters: Counters, clock: Clock, log: MetricsLog, progress: Progress, stop: StopSignal
) -> None:
    """What the process before was kept from: the evaluation of the step that it ended behind, and the selection."""
    assert job.select is not None
    if clock.evaluation_is_due(counters) and not any(
        r["step"] == counters.iteration and "loss" not in r for r in log.records
    ):
        clock.evaluate(state, counters, progress, stop)
    job.select(log.records)


# ---------------------------------------------------------------- bad numbers


class NonFinite(RuntimeError):
    """The numbers stay bad after every roll-back."""

    def __init__(self, report: dict[str, Any]):
        super().__init__(
            f"loss or gradients were not finite {BAD_STEPS_IN_A_ROW} times in a row after "
            f"{report['rollbacks']} roll-backs, at step {report['step']}"
        )
        self.report = report


class Guard:
    """Counts steps that the state was protected from, and goes back to the last checkpoint when they persist.

    The data goes on behind the bad batches: what is rolled back is the state alone. The numbers of good steps are shown
    to what follows the routers.
    """

    def __init__(self, job: Job, seed: int, counters: Counters, note: Callable[[str], None]):
        self._job, self._seed, self._note = job, seed, note
        self._capacity = None if job.capacity is None else Controller(job.capacity, counters.capacity)
        self._alarm = CollapseAlarm(job.experts, counters.alarm)
        self._pending: dict[str, Any] | None = None
        self._losses: list[float] = []

    def step(self, state: TrainState, counters: Counters, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """One step. The numbers of the step before are looked at while it runs; if they take the state back, the
        step is done again from there, so that nothing depends on when numbers are looked at."""
        total = jnp.int32(counters.total_steps)
        factor = None if self._capacity is None else self._capacity.factor(counters.iteration)
        state, metrics = self._job.step(state, batch, total, factor)
        if self._is_last_straw(counters):
            state, metrics = self._job.step(self._rolled_back(state, counters), batch, total, factor)
        counters.iteration += 1
        self._pending = metrics
        if factor is not None:
            metrics = metrics | {"capacity/factor": factor}
        return state, metrics

    def settle(self, state: TrainState, counters: Counters) -> TrainState:
        """Looks at the numbers of the last step now; the state to go on with."""
        return self._rolled_back(state, counters) if self._is_last_straw(counters) else state

    def _is_last_straw(self, counters: Counters) -> bool:
        """Counts the step whose numbers wait; whether it was one bad step too many."""
        before, self._pending = self._pending, None
        if before is None:
            return False
        self._losses = [*self._losses[-9:], float(before["loss"])]
        good = bool(float(before["finite"]))
        if self._capacity is not None:
            self._capacity.observe(before if good else None)
        if good:
            for sentence in [*self._alarm.observe(before), *self._job.observe(before)]:
                self._note(f"step {counters.iteration}: {sentence}")
            counters.tokens_seen += int(before["tokens"])
            counters.bad_in_a_row = 0
            return False
        counters.skipped += 1
        counters.bad_in_a_row += 1
        return counters.bad_in_a_row >= BAD_STEPS_IN_A_ROW

    def _rolled_back(self, state: TrainState, counters: Counters) -> TrainState:
        if counters.rollbacks == MAX_ROLLBACKS:
            report = {"step": counters.iteration, "rollbacks": counters.rollbacks, "skipped": counters.skipped}
            raise NonFinite(report | {"last_losses": [repr(x) for x in self._losses]})
        counters.rollbacks += 1
        counters.bad_in_a_row = 0
        self._job.checkpoints.wait()
        if self._job.checkpoints.newest is None:
            return new_state(self._job, self._seed)
        back = self._job.checkpoints.restore(self._job.trainer.shapes.moving)[0]
        return dataclasses.replace(back, frozen=state.frozen)


# ---------------------------------------------------------------- time and logs


class Clock:
    """Seconds, tokens per second, MFU; and fewer steps when they would take longer than the user allows."""

    def __init__(self, config: Any, job: Job, log: MetricsLog):
        self._config, self._job, self._log = config, job, log
        self._before = log.records[-1]["seconds"] if log.records else 0.0
        self._loop = self._mark = (0.0, 0, 0)  # time, iteration, tokens: when the loop ran, and at the last log

    @property
    def running(self) -> bool:
        """Whether the first step of this process is done."""
        return self._loop[1] > 0

    def seconds(self) -> float:
        """Since the run began, over all resumptions."""
        return self._before + time.perf_counter() - self._job.begin

    def log(self, metrics: dict[str, Any], counters: Counters, progress: Progress) -> None:
        """One record; the first step of a process stands apart, since it waited for everything."""
        values = {name: float(value) for name, value in metrics.items()}
        now = (time.perf_counter(), counters.iteration, counters.tokens_seen)
        if not self.running:
            self._loop = self._mark = now
            values["first_step_seconds"] = now[0] - self._job.begin
            progress.note(f"first step after {values['first_step_seconds']:.1f} s")
        else:
            rate = (now[2] - self._mark[2]) / (now[0] - self._mark[0])
            peak = matmul_peak_flops(self._config.compute.dtype) * jax.device_count()  # measured at the first call
            values |= {"tokens_per_second": rate, "mfu": rate * self._job.flops_per_token / peak}
            self._mark = (time.perf_counter(), *now[1:])
            self._plan(counters, now)
        values |= {"tokens_seen": counters.tokens_seen, "seconds": self.seconds()}
        values |= {"skipped": counters.skipped, "rollbacks": counters.rollbacks}
        values |= {f"router/{name}/collapsed": float(alarm["collapsed"]) for name, alarm in counters.alarm.items()}
        self._log.write(counters.iteration, values)
        rate_text = f"  {values['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in values else ""
        progress.update(counters.iteration, counters.total_steps, f"{self._job.summary(values)}{rate_text}")

    def evaluation_is_due(self, counters: Counters) -> bool:
        """Whether to evaluate behind this step: every so many steps; where the best is kept, behind the last, too."""
        every, last = self._config.train.eval_every, counters.iteration == counters.total_steps
        if not counters.iteration:
            return False
        return (bool(every) and counters.iteration % every == 0) or (last and self._job.select is not None)

    def evaluate(self, state: TrainState, counters: Counters, progress: Progress, stop: StopSignal) -> None:
        """One record of held-out figures; none if it is asked to stop on the way."""
        begin = time.perf_counter()

        def stopped() -> bool:
            hosts.beat(counters.iteration)
            return stop.ask()

        values = self._job.evaluate(state.variables, stopped)
        spent = time.perf_counter() - begin  # not training time
        self._mark = (self._mark[0] + spent, *self._mark[1:])
        if stop.stopping:
            return
        self._log.write(counters.iteration, values | {"tokens_seen": counters.tokens_seen, "seconds": self.seconds()})
        progress.note("  ".join(f"{name} {value:.3f}" for name, value in values.items()))

    def _plan(self, counters: Counters, now: tuple[float, int, int]) -> None:
        """Plans the number of steps to what fits; once the learning rate decays, the plan only gets shorter."""
        train, optim = self._config.train, self._config.optim
        if not train.max_minutes:
            return
        decay_begins = counters.total_steps * (1 - optim.decay_share) if optim.schedule == "wsd" else 0
        grows = counters.iteration < min(max(decay_begins, optim.warmup_steps), counters.total_steps)
        most = train.steps if grows else counters.total_steps
        per_step = (now[0] - self._loop[0]) / (now[1] - self._loop[1])
        fits = counters.iteration + (train.max_minutes * 60 - self.seconds()) / per_step
        planned = int(np.clip(fits, counters.iteration + 1, most))
        counters.total_steps = hosts.exchange("planned steps", planned)[0]  # the same for every process
