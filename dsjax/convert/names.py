"""Which tensor of a Hugging Face checkpoint is which part of which variable of the decoder.

A file has a tensor for each layer, and each expert, of what the decoder stacks into one variable; and a matrix of a
file is (outputs, inputs), with several heads in one axis, where a variable is (inputs ..., outputs ...):

    model.layers.7.mlp.experts.3.up_proj.weight (F, D)    group_1/ffn/w_up (L, E, D, F) at layer 4
    model.layers.7.self_attn.kv_b_proj.weight (N * (h + v), R)    w_k_up (L, R, N, h) and w_v_up (L, R, N, v) at layer 4

The tables below say it for each kind of layer. A model type that has the same kinds under other names has its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from flax import nnx

from dsjax.checkpoint import path_name
from dsjax.config import UserError
from dsjax.convert.fp8 import Dequantized, block_size
from dsjax.convert.parallel import each
from dsjax.models.decoder import Decoder, DecoderConfig
from dsjax.models.multi_token import MULTI_TOKEN
from dsjax.sharding import Buffer
from dsjax.tensor_files import TensorFiles

_UNDER_WAY = 2**30  # bytes of tensors that are being read
_STRIP = 64  # rows

# ---------------------------------------------------------------- the tables

# How a tensor lies in its file: with the variable's axes; these flattened to one; or as a matrix whose inputs are the
# variable's first axis, or all but the last. Of a rotary one, the last channels of the last output axis have angles.
Layout = Literal["table", "vector", "matrix", "matrix from heads", "rotary matrix"]

# Name in the file -> (variable, or those that share its last output axis; layout).
Table = dict[str, tuple[tuple[str, ...], Layout]]

MODEL: Table = {
    "model.embed_tokens.weight": (("embedding",), "table"),
    "model.norm.weight": (("final_norm/scale",), "vector"),
    "lm_head.weight": (("w_logits",), "matrix"),
}
# Of a layer, behind ``model.layers.N.``; the variables are those of its group.
NORMS: Table = {
    "input_layernorm.weight": (("attention_norm/scale",), "vector"),
    "post_attention_layernorm.weight": (("ffn_norm/scale",), "vector"),
}
GROUPED_QUERY: Table = {
    "self_attn.q_proj.weight": (("attention/w_q",), "matrix"),
    "self_attn.k_proj.weight": (("attention/w_k",), "matrix"),
    "self_attn.v_proj.weight": (("attention/w_v",), "matrix"),
    "self_attn.q_proj.bias": (("attention/b_q",), "vector"),
    "self_attn.k_proj.bias": (("attention/b_k",), "vector"),
    "self_attn.v_proj.bias": (("attention/b_v",), "vector"),
    "self_attn.o_proj.weight": (("attention/w_out",), "matrix from heads"),
}
LATENT: Table = {
    "self_attn.q_proj.weight": (("attention/w_q",), "rotary matrix"),
    "self_attn.q_a_proj.weight": (("attention/w_q_down",), "matrix"),
    "self_attn.q_a_layernorm.weight": (("attention/q_norm/scale",), "vector"),
    "self_attn.q_b_proj.weight": (("attention/w_q_up",), "rotary matrix"),
    "self_attn.kv_a_proj_with_mqa.weight": (("attention/w_kv_down",), "rotary matrix"),
    "self_attn.kv_a_layernorm.weight": (("attention/kv_norm/scale",), "vector"),
    "self_attn.kv_b_proj.weight": (("attention/w_k_up", "attention/w_v_up"), "matrix"),
    "self_attn.o_proj.weight": (("attention/w_out",), "matrix from heads"),
    # The rotary channels of an indexer stand first, and half apart whatever those of the attention do.
    "self_attn.indexer.wq_b.weight": (("attention/indexer/w_q",), "matrix"),
    "self_attn.indexer.wk.weight": (("attention/indexer/w_k",), "matrix"),
    "self_attn.indexer.k_norm.weight": (("attention/indexer/k_norm/scale",), "vector"),
    "self_attn.indexer.k_norm.bias": (("attention/indexer/k_norm/bias",), "vector"),
    "self_attn.indexer.weights_proj.weight": (("attention/indexer/w_heads",), "matrix"),
}
DENSE: Table = {
    "mlp.gate_proj.weight": (("ffn/w_gate",), "matrix"),
    "mlp.up_proj.weight": (("ffn/w_up",), "matrix"),
    "mlp.down_proj.weight": (("ffn/w_down",), "matrix"),
}
EXPERTS: Table = {
    "mlp.gate.weight": (("ffn/w_router",), "matrix"),
    "mlp.gate.e_score_correction_bias": (("ffn/selection_bias",), "vector"),
    "mlp.experts.{expert}.gate_proj.weight": (("ffn/w_gate",), "matrix"),
    "mlp.experts.{expert}.up_proj.weight": (("ffn/w_up",), "matrix"),
    "mlp.experts.{expert}.down_proj.weight": (("ffn/w_down",), "matrix"),
    "mlp.shared_experts.gate_proj.weight": (("ffn/shared/w_gate",), "matrix"),
    "mlp.shared_experts.up_proj.weight": (("ffn/shared/w_up",), "matrix"),
    "mlp.shared_experts.down_proj.weight": (("ffn/shared/w_down",), "matrix"),
}

# Of a module of multi-token prediction, whose layer has the tensors of the last group's beside these.
MULTI_TOKEN_PREDICTION: Table = {
    "enorm.weight": (("embedding_norm/scale",), "vector"),
    "hnorm.weight": (("hidden_norm/scale",), "vector"),
    "eh_proj.weight": (("w_join",), "matrix from heads"),
    "shared_head.norm.weight": (("final_norm/scale",), "vector"),
}
# And what its files repeat of the model.
REPEATED = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}

# What a file may hold beside the model: kept byte for byte, not used. Behind ``model.layers.``:
TABLES_OF_ANGLES = re.compile(r"\d+\.self_attn\.rotary_emb\.inv_freq")
FLOATS = ("float32", "bfloat16", "float16")
# Variables that only training uses, which no file has.
ONLY_TRAINING = ("ffn/entropy_multipliers", "ffn/replicas", "ffn/mean_load")


def pairs_are_neighbours(hf_config: Mapping[str, Any]) -> bool:
    """Whether the two channels of a rotary pair are (2i, 2i + 1) in the file; else, as in the decoder, half apart."""
    kind = hf_config.get("model_type")
    always = kind in ("deepseek_v2", "deepseek_v32")
    return always or (kind == "deepseek_v3" and bool(hf_config.get("rope_interleave", True)))


# ---------------------------------------------------------------- one tensor


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor of a file is in the decoder.

    Attributes:
        variables: paths as in a checkpoint; if there are several, they share the last output axis.
        index: of the part of each of them: (), (layer,) or (layer, expert).
        shapes: of these parts.
        layout: in the file.
        pairs: last channels of the last output axis that stand in the file as pairs of neighbours.
    """

    variables: tuple[str, ...]
    index: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    layout: Layout
    pairs: int = 0

    @property
    def _whole(self) -> tuple[int, ...]:
        """Shape of the parts joined along their last axis."""
        return (*self.shapes[0][:-1], sum(shape[-1] for shape in self.shapes))

    @property
    def _num_inputs(self) -> int:
        """Axes of a part, from the first, that are inputs of a matrix."""
        return {"table": 0, "vector": 0, "matrix from heads": len(self._whole) - 1}.get(self.layout, 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the file."""
        whole, n = self._whole, self._num_inputs
        if self.layout == "table":
            return whole
        return (math.prod(whole[n:]), math.prod(whole[:n])) if n else (math.prod(whole),)

    def split(self, x: np.ndarray) -> list[np.ndarray]:
        """The parts of the variables, from the tensor in the file; views of it where they can be."""
        whole, n = self._whole, self._num_inputs
        x = x.reshape(*whole[n:], *whole[:n])
        if self.pairs:
            x = np.take(x, self._halves_apart(), axis=len(whole) - n - 1)
        x = np.moveaxis(x, range(-n, 0), range(n))
        ends = itertools.accumulate(shape[-1] for shape in self.shapes)
        return [x[..., end - shape[-1] : end] for end, shape in zip(ends, self.shapes, strict=True)]

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor in the file, from the parts of the variables: the inverse of :meth:`split`."""
        x, n = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1), self._num_inputs
        if self.pairs:
            x = x[..., np.argsort(self._halves_apart())]
        return np.moveaxis(x, range(n), range(-n, 0)).reshape(self.shape)

    def _halves_apart(self) -> np.ndarray:
        """Of each channel of the decoder, its number in the file: those without an angle, then all x, then all y."""
        width = self._whole[-1]
        first = width - self.pairs
        return np.concatenate([np.arange(first), np.arange(first, width, 2), np.arange(first + 1, width, 2)])


@dataclasses.dataclass(frozen=True)
class Variable:
    """Shape and logical axes of a variable of the decoder, stacked over the layers of its group."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]


def variables_of(config: DecoderConfig) -> dict[str, Variable]:
    """Every parameter and buffer by its path in a checkpoint."""
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return {
        f"{prefix}/{path_name(path)}": Variable(tuple(leaf.shape), tuple(leaf.get_metadata()["axes"]))
        for prefix, kind in (("params", nnx.Param), ("buffers", Buffer))
        for path, leaf in nnx.to_flat_state(nnx.state(abstract, kind))
    }


def places(config: DecoderConfig, hf_config: Mapping[str, Any], variables: Mapping[str, Variable]) -> dict[str, Place]:
    """Name in the file -> where it is in the decoder, in the order of the layers.

    Raises:
        UserError: the decoder has a variable that no file has.
    """
    shapes = {name: variable.shape for name, variable in variables.items()}
    left = {name.partition("/")[2]: name for name in shapes}  # the file knows no difference of parameters and buffers
    found: dict[str, Place] = {}
    neighbours = pairs_are_neighbours(hf_config)

    def add(names: Iterator[tuple[str, tuple[int, ...]]], group: str, row: tuple[tuple[str, ...], Layout], rope: int):
        variables, layout = row
        paths = tuple(paths_of.get(group + variable, "") for variable in variables)
        if not all(paths):
            return  # biases, query compression ...: what a model may have
        for name, index in names:
            parts = tuple(shapes[path][len(index) :] for path in paths)
            pairs = rope if layout == "rotary matrix" and neighbours else 0
            found[name] = Place(paths, index, parts, layout, pairs)
        for variable in variables:
            left.pop(group + variable, None)

    paths_of = dict(left)
    for name, row in MODEL.items():
        add(iter([(name, ())]), "", row, 0)

    def add_layers(prefix: str, first: int, num_layers: int, attention: Any) -> None:
        """Those of a stack, whose variables begin with ``prefix``."""
        kind = LATENT if prefix + "attention/w_kv_down" in paths_of else GROUPED_QUERY
        ffn = EXPERTS if prefix + "ffn/w_router" in paths_of else DENSE
        for name, row in (NORMS | kind | ffn).items():
            experts = shapes[paths_of[prefix + "ffn/w_gate"]][1] if "{expert}" in name else None
            names = _names(f"model.layers.{{layer}}.{name}", first, num_layers, experts)
            add(names, prefix, row, getattr(attention, "rope_dim", 0))

    first = 0
    for number, (group, num_layers) in enumerate(config.sized_groups()):
        add_layers(f"group_{number}/", first, num_layers, group.attention)
        first += num_layers
    if config.multi_token is not None:
        modules = config.multi_token.num_modules
        for name, row in MULTI_TOKEN_PREDICTION.items():
            add(_names(f"model.layers.{{layer}}.{name}", first, modules, None), f"{MULTI_TOKEN}/", row, 0)
        add_layers(f"{MULTI_TOKEN}/block/", first, modules, config.groups[-1].attention)
    strange = [name for name in left if not name.endswith(ONLY_TRAINING)]
    if strange:
        raise UserError(f"the model has the variable {strange[0]}, for which Hugging Face's checkpoints have no name")
    return found


def _names(pattern: str, first: int, num_layers: int, experts: int | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names that a pattern stands for, with the index of each in its group."""
    for layer in range(num_layers):
        if experts is None:
            yield pattern.format(layer=first + layer), (layer,)
        else:
            for expert in range(experts):
                yield pattern.format(layer=first + layer, expert=expert), (layer, expert)


# ---------------------------------------------------------------- all tensors of a checkpoint


@dataclasses.dataclass(frozen=True)
class Matched:
    """What each tensor of a checkpoint is.

    Attributes:
        places: in the decoder.
        copies: tensors that must hold the same as another one, under its name: an output matrix that is tied, and what
            modules of multi-token prediction repeat of the model.
        kept: what is not the model's, to be kept as it is: layers of multi-token prediction without their joint,
            tables of angles.
        variables: of the decoder.
        dtypes: of each of them, one that holds every part exactly.
    """

    places: dict[str, Place]
    copies: dict[str, str]
    kept: list[str]
    variables: dict[str, Variable]
    dtypes: dict[str, np.dtype]


def match(tensors: Dequantized, hf_config: Mapping[str, Any], config: DecoderConfig) -> Matched:
    """Finds the place of every tensor, each exactly once.

    Raises:
        UserError: names the tensor that is unknown or missing, or that has another shape or is of no float type.
    """
    variables = variables_of(config)
    placed = places(config, hf_config, variables)
    missing = [name for name in placed if name not in tensors]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"tensor {missing[0]!r}{more} is missing; config.json describes a model that has it")
    copies = {copy: of for copy, of in copies_of(config).items() if copy in tensors}
    kept = [name for name in tensors if name not in placed and _is_kept(name, config.num_layers, hf_config)]
    unknown = sorted(set(tensors) - placed.keys() - copies.keys() - set(kept))
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise UserError(f"tensor {unknown[0][:100]!r}{more} is unknown; the model of config.json has none of that name")
    dtypes: dict[str, np.dtype] = {}
    for name, place in (placed | {copy: placed[of] for copy, of in copies.items()}).items():
        kind = tensors.kind(name)
        if kind.shape != place.shape:
            raise UserError(f"{kind.file}: tensor {name!r} has shape {kind.shape}; by config.json it is {place.shape}")
        if str(kind.dtype) not in FLOATS:
            raise UserError(
                f"{kind.file}: tensor {name!r} has type {kind.dtype}; a weight is one of {', '.join(FLOATS)}"
            )
        for variable in place.variables:
            same = dtypes.get(variable, kind.dtype) == kind.dtype
            dtypes[variable] = kind.dtype if same else np.dtype(np.float32)
    return Matched(placed, copies, kept, variables, dtypes)


def copies_of(config: DecoderConfig) -> dict[str, str]:
    """What files may repeat, and of what."""
    head = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
    copies = {"lm_head.weight": head} if config.tied else {}
    modules = 0 if config.multi_token is None else config.multi_token.num_modules
    for layer in range(config.num_layers, config.num_layers + modules):
        for name, of in REPEATED.items():
            copies[f"model.layers.{layer}.{name}"] = head if of == "lm_head.weight" else of
    return copies


def _is_kept(name: str, num_layers: int, hf_config: Mapping[str, Any]) -> bool:
    layer = re.match(r"model\.layers\.(\d{1,6})\.", name)
    if layer is None:
        return False
    more = hf_config.get("num_nextn_predict_layers")
    extra = range(num_layers, num_layers + (more if isinstance(more, int) else 0))
    return int(layer[1]) in extra or TABLES_OF_ANGLES.fullmatch(name.removeprefix("model.layers.")) is not None


def check_copies(tensors: Dequantized, copies: Mapping[str, str]) -> None:
    """Raises:
    UserError: a copy differs from what it is a copy of.
    """
    for copy, of in copies.items():
        if not np.array_equal(tensors[copy].view(np.uint8), tensors[of].view(np.uint8)):
            raise UserError(f"tensor {copy!r} differs from {of!r}; they must be equal")


def read_arrays(files: TensorFiles, hf_config: Mapping[str, Any], config: DecoderConfig) -> dict[str, np.ndarray]:
    """Every variable of a model that fits in memory, by its path in a checkpoint, in the type that the files have.

    Args:
        files: the tensors of a folder; of 8-bit floats, scaled by blocks, the bfloat16 values are taken.
        hf_config: config.json of the folder.
        config: the model that it describes.

    Raises:
        UserError: names the tensor that is unknown or missing, has another shape or type, or can not be read.
    """
    tensors = Dequantized(files, block_size(hf_config))
    matched = match(tensors, hf_config, config)
    check_copies(tensors, matched.copies)
    arrays = {path: np.empty(matched.variables[path].shape, dtype) for path, dtype in matched.dtypes.items()}

    def read(name: str) -> None:
        place = matched.places[name]
        for variable, part in zip(place.variables, place.split(tensors[name]), strict=True):
            _copy(part, arrays[variable][place.index])

    sizes = ((name, math.prod(place.shape) * files.kind(name).dtype.itemsize) for name, place in matched.places.items())
    for _ in each(read, sizes, _UNDER_WAY):
        pass
    return arrays


def _copy(x: np.ndarray, target: np.ndarray) -> None:
    """``target[...] = x``, a strip of rows at a time: a matrix that is turned over is then read by cache lines."""
    rows = _STRIP if x.ndim > 1 else max(len(x), 1)
    for row in range(0, len(x), rows):
        target[row : row + rows] = x[row : row + rows]
