"""Learning from preferences: DPO, or a model of rewards, from pairs of texts (docs/preference.md).

It is a recipe like pre-training: the same main, step and loop, with rows, a loss and an evaluation of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from dsjax import hosts
from dsjax.config import Bounds, PositiveFloat, PositiveInt, UserError
from dsjax.data.batch import Batch
from dsjax.data.pipeline import make_batches
from dsjax.data.prepare import Corpus, CorpusReport
from dsjax.data.tokenizer import Tokenizer
from dsjax.metrics import write_atomic
from dsjax.models.decoder import Decoder
from dsjax.nn.masks import Documents
from dsjax.rl.log_probs import log_probs_and_entropies
from dsjax.rl.preference import (
    PairBatch,
    TokenPair,
    implicit_rewards,
    lengths_of_pairs,
    of_pairs,
    pair_figures,
    pair_losses,
    pair_row,
    read_pairs,
    row_size,
    split_pairs,
    token_pair,
)
from dsjax.runs import RunFolder
from dsjax.sharding import Rules, host_array_to_global, replicated, rows_of_process, training_rules, use_mesh
from dsjax.train import pretrain
from dsjax.train.curriculum import course_order
from dsjax.train.policy_loss import with_routers
from dsjax.train.pretrain import Pretrain, Regime, Setting
from dsjax.train.start import Start, inherited
from dsjax.train.step import LossFunction, LossReport

Say = Callable[[str], None]
REFERENCE = "reference.json"  # in the run folder
_ENDLESS = 2**48  # rows on offer, see dsjax.data.pipeline


@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """Pairs of texts, in files that :func:`dsjax.rl.preference.read_pairs` reads.

    Attributes:
        path: to learn from.
        held_out: to evaluate on; empty: a share of the prompts of ``path``, ``data.held_out_share``.
        epochs: how often each is learned from.
    """

    path: str = "pairs.jsonl"
    held_out: str = ""
    epochs: PositiveInt = 1


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """How a pair becomes a loss.

    Attributes:
        beta: for DPO: how much a difference in log-probability is worth; the smaller, the further the policy may go.
        per_token: for DPO: log-probabilities are means over tokens, and not sums.
        label_smoothing: the share of pairs that may be the wrong way round.
    """

    beta: PositiveFloat = 0.1
    per_token: bool = False
    label_smoothing: Annotated[float, Bounds(ge=0, lt=0.5)] = 0.0


@dataclasses.dataclass(frozen=True)
class Preference(Pretrain):
    """A run that goes on from a model and learns from pairs of texts.

    Model and tokenizer are those of the run that ``train.start_from`` names; ``data`` has the size of rows and batches
    and the seed, and its sources are not looked at. Steps are those of ``pairs.epochs``; ``train.steps`` is the most.

    Attributes:
        method: ``dpo``: a policy that prefers what was chosen; ``reward``: a model with a head that gives it a higher
            value.
        pairs: what is learned from.
        labels: how.
    """

    method: Literal["dpo", "reward"] = "dpo"
    pairs: PairsConfig = PairsConfig()
    labels: LabelConfig = LabelConfig()

    def validate(self) -> None:
        super().validate()
        if not self.train.start_from:
            raise UserError("train.start_from is empty; name there the run whose model is to learn from pairs")

    @property
    def loss_fn(self) -> LossFunction:
        return preference_loss(self.method, self.labels)

    def step_batch(self, mesh: Any) -> Batch:
        plain = super().step_batch(mesh)
        if self.method == "reward":
            return plain
        place = jax.sharding.NamedSharding(mesh, Rules().spec("batch"))
        reference_B2 = jax.ShapeDtypeStruct((self.data.batch_size, 2), jnp.float32, sharding=place)
        return PairBatch(**vars(plain), reference_B2=reference_B2)

    def begins(self, run_folder: RunFolder) -> tuple[Preference, Tokenizer]:
        return inherited(self, run_folder, values="head" if self.method == "reward" else "none", plain="pairs")


# ---------------------------------------------------------------- loss


def pair_rewards(
    method: Literal["dpo", "reward"], labels: LabelConfig, model: Decoder, out: Any, batch: Batch
) -> Float[Array, "B 2"]:
    """What the model gives the chosen and the rejected text of each row."""
    if method == "reward":
        return of_pairs(model.values(out, batch.tokens_BT, batch.documents, batch.features_BTC), batch)
    log_prob_B2 = of_pairs(log_probs_and_entropies(model, out, batch.targets_BT)[0], batch)
    reference_B2 = batch.reference_B2 if isinstance(batch, PairBatch) else jnp.zeros_like(log_prob_B2)
    lengths_B2 = lengths_of_pairs(batch)
    return implicit_rewards(log_prob_B2, reference_B2, lengths_B2, beta=labels.beta, per_token=labels.per_token)


def preference_loss(method: Literal["dpo", "reward"], labels: LabelConfig) -> LossFunction:
    """The mean loss of pairs, and the auxiliary losses of the model's routers."""

    def loss_fn(
        model: Decoder, batch: Batch, key: jax.Array, total_weight: Float[Array, ""]
    ) -> tuple[Float[Array, ""], LossReport]:
        del key
        out = model(batch.tokens_BT, batch.documents, features_BTC=batch.features_BTC)
        reward_B2 = pair_rewards(method, labels, model, out, batch)
        share_B = jnp.sum(batch.loss_weight_BT, axis=1) / total_weight  # 1 / pairs of the whole batch
        loss = jnp.sum(share_B * pair_losses(reward_B2, label_smoothing=labels.label_smoothing))
        metrics = {"loss/preference": loss}
        for name, x_B in pair_figures(reward_B2).items():
            metrics[f"preference/{name}"] = jax.lax.stop_gradient(jnp.sum(share_B * x_B))
        return with_routers(loss, metrics, jnp.sum(share_B), {"": out})

    return loss_fn


# ---------------------------------------------------------------- run


def check(config: Preference) -> tuple[Any, Any]:
    """See :func:`dsjax.train.pretrain.check`."""
    return pretrain.check(config)


def run(config: Preference, folder: pathlib.Path, *, quiet: bool = False) -> int:
    """Trains, or goes on with, the run in ``folder``; returns the exit code."""
    config, tokenizer = config.begins(RunFolder(folder))
    check(config)
    return pretrain.run(config, folder, quiet=quiet, regime=Regime(functools.partial(material, tokenizer), parts))


# ---------------------------------------------------------------- rows


class PairRows:
    """Random access to the rows of a run, epoch after epoch, each time in another order; a pair each.

    Attributes:
        training, held_out: pairs.
    """

    def __init__(self, training: Sequence[TokenPair], held_out: Sequence[TokenPair], config: Preference, end_id: int):
        self.training, self.held_out = tuple(training), tuple(held_out)
        self._seq_len, self._seed, self._end_id = config.data.seq_len, config.data.seed, end_id
        self._ends, self._turn = config.method == "reward", config.model.turn
        # Two, because the threads that read ahead may be in the next epoch already.
        self._order = functools.lru_cache(maxsize=2)(self._make_order)

    def _make_order(self, epoch: int) -> list[int]:
        return course_order(np.zeros(len(self.training)), 0.0, self._seed, epoch).tolist()

    def number(self, index: int) -> int:
        """The training pair of row ``index``."""
        epoch, place = divmod(index, len(self.training))
        return self._order(epoch)[place]

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.row(self.training[self.number(index)])

    def row(self, pair: TokenPair) -> dict[str, np.ndarray]:
        """One pair as a row."""
        return pair_row(pair, self._seq_len, self._end_id, ends=self._ends, turn=self._turn)

    def batch(self, pairs: Sequence[TokenPair], size: int) -> Batch:
        """Some pairs as a batch of ``size`` rows; behind them is padding."""
        rows = [self.row(pair) for pair in pairs]
        fields = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        behind = size - len(rows)
        fields = {name: np.pad(x, [(0, behind), (0, 0)]) for name, x in fields.items()}
        documents = Documents(fields["document_ids"], fields["positions"])
        return Batch(fields["tokens"], fields["targets"], fields["loss_weight"], documents)


def material(tokenizer: Tokenizer, config: Preference, say: Say) -> tuple[Preference, Corpus, PairRows]:
    """The pairs that fit into rows; the config with how many steps that is.

    Raises:
        UserError: a file is none of pairs, or no pair fits.
    """
    training = read_pairs(config.pairs.path)
    if config.pairs.held_out:
        held_out = read_pairs(config.pairs.held_out)
    else:
        training, held_out = split_pairs(training, config.data.held_out_share)
    fitting = list[list[TokenPair]]()
    for name, pairs in (("learn from", training), ("hold out", held_out)):
        found = [token_pair(pair, tokenizer) for pair in pairs]
        size = functools.partial(row_size, ends=config.method == "reward", turn=config.model.turn)
        fits = [pair for pair in found if size(pair) <= config.data.seq_len]
        if not fits:
            raise UserError(
                f"data.seq_len is {config.data.seq_len}; of {len(found)} pairs to {name} none fits into a row with both"
                " its texts: raise it"
            )
        if len(fits) < len(found):
            say(f"{len(found) - len(fits)} of {len(found)} pairs to {name} do not fit into data.seq_len: left out")
        fitting.append(fits)
    rows = PairRows(fitting[0], fitting[1], config, tokenizer.end_id)
    steps = min(config.train.steps, -(-len(rows.training) * config.pairs.epochs // config.data.batch_size))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    return config, pair_corpus(rows, tokenizer, config), rows


def pair_corpus(rows: PairRows, tokenizer: Tokenizer, config: Preference) -> Corpus:
    """What a run says of its data; there are no documents."""
    sizes = [sum(row_size(pair, ends=False) for pair in pairs) for pairs in (rows.training, rows.held_out)]
    pairs = [[dataclasses.astuple(pair) for pair in side] for side in (rows.training, rows.held_out)]
    content = hashlib.sha256(json.dumps([tokenizer.to_json(), pairs]).encode()).hexdigest()
    settings = repr((content, config.data.seq_len, config.data.seed))
    report = CorpusReport(
        num_read=len(rows.training) + len(rows.held_out),
        bytes_read=0,
        skipped=(),
        duplicates=(),
        num_training=len(rows.training),
        training_bytes=0,
        training_tokens=sizes[0],
        num_held_out=len(rows.held_out),
        held_out_bytes=0,
        held_out_tokens=sizes[1],
        vocab_size=tokenizer.vocab_size,
    )
    fingerprint = hashlib.sha256(settings.encode()).hexdigest()
    return Corpus((), (), tokenizer, fingerprint, report, content=content)


class PairBatches:
    """This process's rows of each batch, with what the policy in the beginning says of them.

    Args:
        batches: of plain rows.
        rows: where those are from.
        reference_N2: of each training pair.
        size: rows of a batch of this process.
        before: rows of a batch that others have in front of it.
    """

    def __init__(self, batches: Any, rows: PairRows, reference_N2: Float32[np.ndarray, "N 2"], size: int, before: int):
        self._batches, self._rows, self._reference_N2 = batches, rows, reference_N2
        self._size, self._before = size, before
        self.get_state, self.set_state, self.close = batches.get_state, batches.set_state, batches.close

    def __iter__(self) -> PairBatches:
        return self

    def __next__(self) -> PairBatch:
        first = self._batches.get_state()["rows_taken"] + self._before
        numbers = [self._rows.number(index) for index in range(first, first + self._size)]
        return PairBatch(**vars(next(self._batches)), reference_B2=self._reference_N2[numbers])


# ---------------------------------------------------------------- what there is beside


def parts(setting: Setting) -> dict[str, Any]:
    """What the loop gets: the evaluation, and for DPO batches with log-probabilities of the policy as it began."""
    config = cast(Preference, setting.config)
    if config.method == "reward":
        return {"evaluate": evaluation(setting, None)}
    training_N2, held_out_N2 = references(setting)
    part, num_parts = rows_of_process(setting.mesh, config.data.batch_size)
    size = config.data.batch_size // num_parts
    batches = make_batches(setting.corpus, config.data, host_index=part, num_hosts=num_parts, rows=setting.rows)

    def place(batch: PairBatch) -> PairBatch:
        plain = Batch(**{f.name: getattr(batch, f.name) for f in dataclasses.fields(Batch)})
        spec = Rules().spec("batch")
        reference_B2 = host_array_to_global(batch.reference_B2, setting.mesh, spec, part=part, parts=num_parts)
        return PairBatch(**vars(pretrain.place_batch(plain, setting.mesh, part, num_parts)), reference_B2=reference_B2)

    return {
        "evaluate": evaluation(setting, held_out_N2),
        "batches": PairBatches(batches, setting.rows, training_N2, size, part * size),
        "place": place,
    }


def read_rewards(
    setting: Setting, labels: LabelConfig, variables: Any, pairs: Sequence[TokenPair], stopped: Callable[[], bool]
) -> Float32[np.ndarray, "N 2"]:
    """What a model gives the texts of pairs, with a reference of 0; fewer if it was told to stop."""
    config, found = cast(Preference, setting.config), []
    run = _compiled(setting.trainer.graph, setting.mesh, training_rules(config.mesh), config.method, labels)
    for first in range(0, len(pairs), config.data.batch_size):
        some = pairs[first : first + config.data.batch_size]
        batch = pretrain.place_batch(setting.rows.batch(some, config.data.batch_size), setting.mesh)
        found.append(np.asarray(run(variables, batch))[: len(some)])
        if stopped():
            break
    return np.concatenate(found)


@functools.lru_cache(maxsize=4)
def _compiled(graph: Any, mesh: Any, rules: Rules, method: Any, labels: LabelConfig) -> Any:
    def run(variables: Any, batch: Batch) -> Array:
        with use_mesh(mesh, rules):
            model = nnx.merge(graph, variables)
            out = model(batch.tokens_BT, batch.documents)
            return pair_rewards(method, labels, model, out, batch)

    return jax.jit(run, out_shardings=replicated(mesh))  # every process reads them all


def evaluation(setting: Setting, reference_N2: Float32[np.ndarray, "N 2"] | None) -> Any:
    """A function (variables, stopped) -> loss, accuracy and margins on held-out pairs."""
    config = cast(Preference, setting.config)
    labels, pairs = config.labels, setting.rows.held_out
    raw = dataclasses.replace(labels, beta=1.0, per_token=False)

    def evaluate(variables: Any, stopped: Callable[[], bool]) -> dict[str, float]:
        reward_N2 = jnp.asarray(read_rewards(setting, raw, variables, pairs, stopped))
        if reference_N2 is not None:
            num = len(reward_N2)
            length_N2 = jnp.asarray([[len(pair.chosen) + 1, len(pair.rejected) + 1] for pair in pairs[:num]])
            reward_N2 = implicit_rewards(
                reward_N2, jnp.asarray(reference_N2[:num]), length_N2, beta=labels.beta, per_token=labels.per_token
            )
        figures = {"loss": pair_losses(reward_N2, label_smoothing=labels.label_smoothing)} | pair_figures(reward_N2)
        return {f"held_out_{name}": float(jnp.mean(x_N)) for name, x_N in figures.items()}

    return evaluate


def references(setting: Setting) -> tuple[Float32[np.ndarray, "N 2"], Float32[np.ndarray, "M 2"]]:
    """Log-probabilities of training and held-out texts under the weights that training begins with.

    They are computed once and kept in the run folder, so that a run that goes on has the same to the last bit. If one
    of several processes does not find them there, all compute them.
    """
    config, run_folder, rows = cast(Preference, setting.config), setting.run, setting.rows
    path, sides = run_folder.path / REFERENCE, (rows.training, rows.held_out)
    found = _kept(path, setting.corpus.content)
    there = hosts.exchange("references", found is not None)
    if found is None or not all(there):
        setting.say(f"reference: log-probabilities of {sum(map(len, sides)):,} pairs")
        source = Start(pathlib.Path(config.train.start_from), setting.corpus.tokenizer, run_folder.base())
        variables = source.variables(setting.trainer, config.train.seed)
        raw = dataclasses.replace(config.labels, beta=1.0, per_token=False)
        found = [read_rewards(setting, raw, variables, pairs, lambda: False) for pairs in sides]
        if not hosts.index():
            run_folder.write(config, setting.corpus)
            kept = {"content": setting.corpus.content, "log_probs": [x_N2.tolist() for x_N2 in found]}
            write_atomic(path, json.dumps(kept) + "\n")
    return found[0], found[1]


def _kept(path: pathlib.Path, content: str) -> list[Float32[np.ndarray, "N 2"]] | None:
    """What an earlier process has computed for the same pairs, if it is there and whole."""
    try:
        kept = json.loads(path.read_bytes())
        if kept["content"] == content:
            return [np.asarray(side, np.float32).reshape(-1, 2) for side in kept["log_probs"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
