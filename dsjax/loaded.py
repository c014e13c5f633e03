"""A model that is ready to use, from a Hugging Face folder or a run.

import dsjax

model = dsjax.load("DeepSeek-V2-Lite-Chat")
model.generate(model.tokenizer.encode("def f(")[None], max_new_tokens=64)
model.logits(tokens_BT)
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh
from jaxtyping import Array, Float, Float32, Int

from dsjax.checkpoint import path_name
from dsjax.config import UserError, apply_overrides, read_json, validate
from dsjax.convert.families import config_from_hf, longest_text, meant_length
from dsjax.convert.names import read_arrays
from dsjax.data.chat import ChatTemplate
from dsjax.data.hf_tokenizer import load_hf_tokenizer, load_templates, stated_end_ids
from dsjax.data.structure.scanner import Scanner
from dsjax.data.structure.stored import scanner
from dsjax.data.tokenizer import Tokenizer, load_tokenizer
from dsjax.infer.engine import generate, placed
from dsjax.infer.sampling import SamplingConfig
from dsjax.models.decoder import ComputeConfig, Decoder, DecoderConfig
from dsjax.nn.fields import NUM_FIELDS
from dsjax.nn.masks import Documents
from dsjax.runs import RunFolder, load_variables
from dsjax.sharding import (
    MESH_AXES,
    MeshConfig,
    Rules,
    host_array_to_global,
    joined,
    make_mesh,
    replicated,
    split_variables,
    use_mesh,
)
from dsjax.tensor_files import TensorFiles

FILLED_UP = 64  # positions that rows of texts are a multiple of


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model on its devices.

    Attributes:
        graph, params: of :class:`flax.nnx`; ``params`` are all variables, buffers included.
        config: shape of the model.
        compute: how it is computed.
        tokenizer: of its folder; None: there is none.
        end_ids: tokens that end a text.
        max_length: positions that it is meant for.
        templates: chat templates by name; the usual one is ``default``.
        mesh, rules: devices, and what lies on which.
        cuts_prompts: training cut texts where prompts end (``Source.marked``), so the last token of one stands there
            as it does here. Of other models it may be one that goes on behind the prompt, and is chosen anew.
        w_values_D: the head of a model of rewards, which ``graph`` is without; None: there is none.
    """

    graph: Any
    params: Any
    config: DecoderConfig
    compute: ComputeConfig
    tokenizer: Tokenizer | None
    end_ids: tuple[int, ...]
    max_length: int
    templates: Mapping[str, ChatTemplate]
    mesh: Mesh
    rules: Rules
    cuts_prompts: bool = False
    w_values_D: np.ndarray | None = None

    @property
    def model(self) -> Decoder:
        """The module, with these parameters."""
        return nnx.merge(self.graph, self.params)

    def logits(self, tokens_BT: Any, mask_BT: Any | None = None) -> Float[Array, "B T V"]:
        """Scores of the token behind each position, float32.

        Args:
            tokens_BT: ids, rows of an array or a list.
            mask_BT: 0 or False where a row has no token, at its start or end; None: it has one everywhere.

        Raises:
            UserError: an id that the model has not.
        """
        tokens_BT, ids_BT = self._rows(tokens_BT, mask_BT)
        return self._forward(self.params, *self._put(tokens_BT, ids_BT))[: len(tokens_BT)]

    def rewards(
        self, prompts: Sequence[str], texts: Sequence[str], *, batch_size: int = 16
    ) -> Float32[np.ndarray, " N"]:
        """What a model of rewards (docs/preference.md) gives each text behind its prompt.

        Of two texts behind one prompt, that with r more is preferred with a probability of sigma(r), as far as the
        model knows; behind different prompts such a difference says nothing. Of a policy with a head of values it is
        the value of the whole text.

        Args:
            prompts, texts: N of each; a text is whole, and the boundary behind it is put there.
            batch_size: texts that are read at a time.

        Raises:
            UserError: the model has no such head, or no tokenizer; there are not as many prompts as texts; a text with
                its prompt is longer than the model is meant for; or ``batch_size`` is below 1.
        """
        if self.w_values_D is None:
            raise UserError("the model gives no rewards: it has no head for them, as one of method=reward has")
        if len(prompts) != len(texts):
            raise UserError(f"there are {len(prompts)} prompts and {len(texts)} texts; each text has its own prompt")
        if not _is_whole(batch_size, 2**31) or not batch_size:
            raise UserError(f"batch_size is {batch_size!r}; it must be a whole number from 1")
        rows = [self.whole_text(*both) for both in zip(prompts, texts, strict=True)]
        if rows and (longest := max(map(len, rows))) > self.max_length:
            raise UserError(
                f"a text has {longest} tokens with its prompt; the model is meant for {self.max_length} positions"
            )
        found_N = np.zeros(len(rows), np.float32)
        order = sorted(range(len(rows)), key=lambda n: len(rows[n]))  # little is filled up, and few shapes are compiled
        for first in range(0, len(order), batch_size):
            some = order[first : first + batch_size]
            shape = (batch_size, -(-len(rows[some[-1]]) // FILLED_UP) * FILLED_UP)
            tokens_BT, ids_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
            for row, n in enumerate(some):
                tokens_BT[row, : len(rows[n])], ids_BT[row, : len(rows[n])] = rows[n], 1
            told_B = self._read_rewards(self.params, self.w_values_D, *self._put(tokens_BT, ids_BT))
            found_N[some] = np.asarray(told_B)[: len(some)]
        return found_N

    def whole_text(self, prompt: str, text: str) -> list[int]:
        """The tokens of a prompt and a text between two boundaries, as :meth:`rewards` reads them.

        Raises:
            UserError: the model has no tokenizer.
        """
        if (tokenizer := self.tokenizer) is None:
            raise UserError("the model's folder has no tokenizer.json: it can read no text")
        ids = [tokenizer.encode_said(str(form)).tolist() for form in tokenizer.said([prompt, text])]
        return [tokenizer.end_id, *ids[0], *ids[1], tokenizer.end_id]

    def generate(
        self,
        tokens_BT: Any,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        stop_at_eos: bool = True,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        mask_BT: Any | None = None,
    ) -> Int[np.ndarray, "B T_plus_new"]:
        """The rows with ``max_new_tokens`` more tokens each.

        Args:
            tokens_BT: prompts, rows of an array or a list.
            max_new_tokens: of each row.
            temperature: 0: always the likeliest token.
            stop_at_eos: behind a token of ``end_ids``, a row holds only the first of those.
            top_k: sample from that many of the likeliest tokens; 0: from all.
            top_p: sample from the likeliest tokens of that total probability.
            min_p: sample from tokens of at least that share of the likeliest one's probability.
            seed: of the choices, below 2**32.
            mask_BT: 0 or False where a row has no token, at its start or end; None: it has one everywhere.

        Raises:
            UserError: a value out of range, or more positions than the model is meant for.
        """
        settings: Any = (temperature, top_k, top_p, min_p)
        sampling = SamplingConfig(*(x.item() if isinstance(x, np.generic) else x for x in settings))
        validate(sampling)
        if not _is_whole(seed, 2**32 - 1):
            raise UserError(f"seed is {seed!r}; it must be a whole number from 0 to {2**32 - 1}")
        tokens_BT, ids_BT = self._rows(tokens_BT, mask_BT)
        B, T = tokens_BT.shape
        if not _is_whole(max_new_tokens, self.max_length - T):
            raise UserError(
                f"max_new_tokens is {max_new_tokens!r}; with prompts of {T} tokens it must be a whole number from 0 to"
                f" {max(self.max_length - T, 0)}: the model is meant for {self.max_length} positions"
            )
        if max_new_tokens == 0:
            return tokens_BT
        prompts = [row[real > 0].tolist() for row, real in zip(tokens_BT, ids_BT, strict=True)]
        fill, end_id = -B % self._row_devices, self.end_ids[0] if self.end_ids else 0
        parts = generate(
            self.graph,
            self.params,
            prompts + [prompts[-1]] * fill,
            max_tokens=int(max_new_tokens),
            end_id=end_id,
            end_ids=self.end_ids if stop_at_eos else (),
            max_length=self.max_length,
            sampling=sampling,
            seed=int(seed),
            mesh=self.mesh,
            scanners=() if self.config.structure is None else [self._scanner] * (B + fill),
        )
        new_BS = np.concatenate(list(parts), axis=1)[:B]
        new_BS = np.pad(new_BS, [(0, 0), (0, max_new_tokens - new_BS.shape[1])], constant_values=end_id)
        return np.concatenate([tokens_BT, new_BS], axis=1)

    def _put(self, tokens_BT: np.ndarray, ids_BT: np.ndarray) -> list[Any]:
        """Rows on the devices, with features where the model is told them, and as many more as devices need."""
        more = [(0, -len(tokens_BT) % self._row_devices), (0, 0)]
        put = functools.partial(host_array_to_global, mesh=self.mesh, spec=self.rules.spec("batch", None))
        arrays = [put(np.pad(x, more)) for x in (tokens_BT, ids_BT)]
        if self.config.structure is not None:
            features_BTC = np.zeros((*tokens_BT.shape, NUM_FIELDS), np.int16)
            for row, (tokens, real) in enumerate(zip(tokens_BT, ids_BT, strict=True)):
                features_BTC[row, real > 0] = self._scanner.copy().scan(tokens[real > 0])
            arrays.append(put(np.pad(features_BTC, [*more, (0, 0)])))
        return arrays

    @property
    def _row_devices(self) -> int:
        return int(np.prod([self.mesh.shape[axis] for axis in self.rules.batch]))

    def _rows(self, tokens_BT: Any, mask_BT: Any) -> tuple[np.ndarray, np.ndarray]:
        """Ids, and 1 where a row has a token."""
        try:
            tokens_BT = np.asarray(tokens_BT)
        except ValueError:
            raise UserError("tokens are rows of several lengths; fill them up and tell mask_BT where") from None
        if tokens_BT.ndim != 2 or 0 in tokens_BT.shape:
            raise UserError(f"tokens have shape {tokens_BT.shape}; they are rows of at least one token, (B, T)")
        if not np.issubdtype(tokens_BT.dtype, np.integer):
            raise UserError(f"tokens are {tokens_BT.dtype}; they must be whole numbers")
        if tokens_BT.min() < 0 or tokens_BT.max() >= self.config.vocab_size:
            found = tokens_BT.min() if tokens_BT.min() < 0 else tokens_BT.max()
            raise UserError(f"there is a token {found}; the model has those from 0 to {self.config.vocab_size - 1}")
        mask_BT = np.ones(tokens_BT.shape, bool) if mask_BT is None else mask_BT
        try:
            ids_BT = (np.asarray(mask_BT) > 0).astype(np.int32)
        except (ValueError, TypeError):
            raise UserError("the mask has rows of several lengths, or something that is no number") from None
        if ids_BT.shape != tokens_BT.shape or not ids_BT.any(axis=1).all():
            raise UserError(
                f"the mask has shape {ids_BT.shape}; it must have that of the tokens, and a token in each row"
            )
        return tokens_BT.astype(np.int32), ids_BT

    @functools.cached_property
    def _scanner(self) -> Scanner:
        """At the beginning of a text."""
        if self.tokenizer is None or self.config.structure is None:
            raise UserError("the model has structure, which is read from text: its folder needs a tokenizer.json")
        return scanner(self.config.structure.language, self.tokenizer)

    @functools.cached_property
    def _forward(self) -> Any:
        def forward(params: Any, *rows: Any) -> Float[Array, "B T V"]:
            with use_mesh(self.mesh, dataclasses.replace(self.rules, length=())):
                model = nnx.merge(self.graph, params)
                return model.logits(_read(model, *rows))

        return jax.jit(forward, out_shardings=replicated(self.mesh))

    @functools.cached_property
    def _read_rewards(self) -> Any:
        def forward(
            params: Any, w_D: Float[Array, " D"], tokens_BT: Any, ids_BT: Int[Array, "B T"], *features: Any
        ) -> Float[Array, " B"]:
            with use_mesh(self.mesh, dataclasses.replace(self.rules, length=())):
                out = _read(nnx.merge(self.graph, params), tokens_BT, ids_BT, *features)
                last_B = jnp.maximum(jnp.sum(ids_BT, axis=1) - 1, 0)
                hidden_BD = out.hidden_BTD[jnp.arange(len(last_B)), last_B].astype(jnp.float32)
                return jnp.einsum("BD,D->B", hidden_BD, w_D, precision="highest")  # as Decoder.values

        return jax.jit(forward, out_shardings=replicated(self.mesh))


def _read(model: Decoder, tokens_BT: Int[Array, "B T"], ids_BT: Int[Array, "B T"], features_BTC: Any = None) -> Any:
    """What a model makes of rows of tokens; ``ids_BT`` is 1 where there is one."""
    positions_BT = jnp.maximum(jnp.cumsum(ids_BT, axis=1) - 1, 0)
    return model(tokens_BT, Documents(ids_BT, positions_BT), features_BTC=features_BTC)


def _is_whole(x: Any, most: int) -> bool:
    """Whether it is a whole number, Python's or NumPy's, from 0 to ``most``."""
    return isinstance(x, (int, np.integer)) and 0 <= int(x) <= most


def load(path: str | pathlib.Path, *, dtype: Any = None, mesh: Mesh | MeshConfig | str | None = None) -> LoadedModel:
    """The model of a Hugging Face folder, or of a run's latest checkpoint.

    Args:
        path: a folder with config.json and model.safetensors (or shards with an index), or a run.
        dtype: of weights and activations, float32 or bfloat16; None: bfloat16 if the weights are stored so, else
            float32.
        mesh: devices: a mesh of dsjax's axes, or its sizes, ``"expert=4,tensor=2"``; None: the first device.

    Raises:
        UserError: there is no model, or one that dsjax can not express; the mesh is none, or the weights do not divide
            over it.
    """
    path = pathlib.Path(path)
    if dtype is not None:
        try:
            name = jnp.dtype(dtype).name
        except TypeError:
            name = ""
        if name not in ("float32", "bfloat16"):
            raise UserError(f"dtype is {dtype!r}; it must be float32 or bfloat16")
        dtype = name
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    if not (path / "config.json").is_file():
        raise UserError(f"{path} holds no model: it has no config.json")
    fields, mesh = read_json(path / "config.json"), _mesh(mesh)
    if (path / "checkpoints").is_dir() or (isinstance(fields, dict) and "model_type" not in fields):
        return _from_run(RunFolder(path), dtype, mesh)
    if not isinstance(fields, dict):
        raise UserError(f"{path / 'config.json'} holds a {type(fields).__name__}, not an object")
    return _from_hf(path, fields, dtype, mesh)


def _from_run(run: RunFolder, dtype: Any, mesh: Mesh) -> LoadedModel:
    _, variables, _ = load_variables(run)
    config = run.read_config()
    compute = dataclasses.replace(config.compute, dtype=dtype or config.compute.dtype)
    model = _on_devices(config.model, compute, variables, _said_by_run(run, config), mesh)
    return dataclasses.replace(model, cuts_prompts=any(source.marked for source in config.data.sources))


def _said_by_run(run: RunFolder, config: Any) -> tuple[Any, ...]:
    """What a run says beside weights; if it was a Hugging Face folder, what that says, whose tokenizer comes first."""
    about: tuple[Any, ...] = (None, (), config.data.seq_len, {})
    converted = run.path / "hf" / "files"  # all but weights
    if (converted / "config.json").is_file():
        fields = read_json(converted / "config.json")
        tokenizer, end_ids, _, templates = _said_by(converted, fields)
        about = tokenizer, end_ids, meant_length(fields, config.model, config.data.seq_len), templates
    tokenizer, end_ids, max_length, templates = about
    if tokenizer is None and run.tokenizer.is_file():
        tokenizer = load_tokenizer(run.tokenizer, end_token=config.data.end_token)
        end_ids = tuple(dict.fromkeys((tokenizer.end_id, *end_ids)))
    return tokenizer, end_ids, max_length, templates


def _from_hf(path: pathlib.Path, fields: dict[str, Any], dtype: Any, mesh: Mesh) -> LoadedModel:
    files = TensorFiles(path)
    config = config_from_hf(fields, files)
    arrays = read_arrays(files, fields, config)
    halves = {str(x.dtype) for name, x in arrays.items() if name.endswith("embedding")} == {"bfloat16"}
    compute = ComputeConfig(dtype=dtype or ("bfloat16" if halves else "float32"))
    abstract = nnx.eval_shape(lambda: Decoder(config, compute, rngs=nnx.Rngs(0)))
    _, params, buffers = split_variables(abstract)
    tree = {"params": params, "buffers": buffers}
    tree = jax.tree_util.tree_map_with_path(lambda path, _: arrays[path_name(path)], tree)
    variables = joined(tree["params"], tree["buffers"])
    return _on_devices(config, compute, variables, _said_by(path, fields), mesh)


def _said_by(path: pathlib.Path, fields: dict[str, Any]) -> tuple[Any, ...]:
    """What a Hugging Face folder says beside weights: tokenizer, end ids, longest text, chat templates."""
    if (path / "tokenizer.json").is_file():
        words = load_hf_tokenizer(path)
        return words.tokenizer, words.end_ids, longest_text(fields), words.templates
    return None, stated_end_ids(path), longest_text(fields), load_templates(path)


def _mesh(said: Any) -> Mesh:
    """The devices to use, as :func:`load` is told of them."""
    if said is None:
        return make_mesh(MeshConfig(), jax.local_devices()[:1])
    if isinstance(said, str):
        said = apply_overrides(MeshConfig(data=1), [word for word in said.split(",") if word])
    if isinstance(said, MeshConfig):
        validate(said, "mesh")
        return make_mesh(said)
    if not isinstance(said, Mesh) or said.axis_names != MESH_AXES:
        raise UserError(
            f"mesh is {said!r}; it must be the sizes of axes, such as 'expert=4,tensor=2', or a mesh with the axes"
            f" {', '.join(MESH_AXES)}"
        )
    return Mesh(said.devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))  # jax.make_mesh has others


def _on_devices(config: DecoderConfig, compute: ComputeConfig, variables: Any, about: Any, mesh: Mesh) -> LoadedModel:
    tokenizer, end_ids, max_length, templates = about
    abstract = nnx.eval_shape(lambda: Decoder(config, compute, rngs=nnx.Rngs(0)))
    graph, params, buffers = split_variables(abstract)
    rows = mesh.shape["data"] * mesh.shape["expert"]
    there = placed(graph, joined(params, buffers), mesh, rows)
    return LoadedModel(
        graph=there.graph,
        params=there.place(variables),
        config=config,
        compute=compute,
        tokenizer=tokenizer,
        end_ids=end_ids,
        max_length=max_length,
        templates=templates,
        mesh=there.mesh,
        rules=there.rules,
        w_values_D=np.asarray(variables["w_values"], np.float32) if config.values == "head" else None,
    )
