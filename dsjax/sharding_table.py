"""The table of docs/sharding.md: every weight's (and buffer's) logical axes, its layout, and what a device holds of it.

python -m dsjax.sharding_table docs/sharding.md     # writes the table between the markers of the file
"""

from __future__ import annotations

import math
import pathlib
import sys

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from dsjax.config import apply_overrides, load_config
from dsjax.models.decoder import Decoder, DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.indexer import IndexerConfig
from dsjax.nn.latent_attention import LatentAttentionConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.sharding import MESH_AXES, MeshConfig, Rules, logical_axes

BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
DEVICES = 8
MESHES = ("data=8", "fsdp=8", "tensor=8", "expert=8", "fsdp=2,expert=2,tensor=2")


def small_moe() -> DecoderConfig:
    """One dense layer and two of eight experts, sized so that every mesh of :data:`MESHES` divides it."""
    attention = AttentionConfig(num_heads=16, num_kv_heads=8, head_dim=8)
    experts = MoEConfig(num_experts=8, top_k=2, d_ff=32, num_shared_experts=1, bias_update_rate=1e-3)
    groups = (LayerGroup(MLPConfig(d_ff=128), attention, num_layers=1), LayerGroup(experts, attention))
    return DecoderConfig(vocab_size=512, d_model=64, num_layers=3, groups=groups)


def small_indexed() -> DecoderConfig:
    """Two layers of latent attention with an indexer, sized likewise."""
    indexer = IndexerConfig(num_heads=8, head_dim=16, top_k=64)
    attention = LatentAttentionConfig(8, q_rank=32, kv_rank=32, nope_dim=16, rope_dim=8, v_dim=16, indexer=indexer)
    return DecoderConfig(512, 64, 2, (LayerGroup(MLPConfig(d_ff=128), attention),))


def abstract_mesh(override: str) -> AbstractMesh:
    """The mesh of ``mesh=OVERRIDE`` over :data:`DEVICES` devices that need not exist."""
    shape = apply_overrides(MeshConfig(data=1), override.split(",")).shape(DEVICES)
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def table(cfg: DecoderConfig) -> str:
    """Markdown: for each weight its axes, its shape, and what one device holds of it under each mesh."""
    model = nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))
    shapes, axes = nnx.to_pure_dict(nnx.split(model)[1]), logical_axes(model)
    meshes = [abstract_mesh(mesh) for mesh in MESHES]
    names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))

    lines = [_row(["weight", "dimensions → mesh axis", "shape", *(f"`{mesh}`" for mesh in MESHES)])]
    lines.append(_row(["---"] * (3 + len(MESHES))))
    held, total = [0] * len(MESHES), 0
    for index, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(shapes)):
        weight = "/".join(str(key.key) for key in path)
        placed = ", ".join(" → ".join((axis, *getattr(Rules(), axis))) for axis in names[index])
        spec = Rules().spec(*names[index])
        shards = [NamedSharding(mesh, spec).shard_shape(leaf.shape) for mesh in meshes]
        cells = ["whole" if shard == leaf.shape else _dims(shard) for shard in shards]
        lines.append(_row([f"`{weight}`", placed, _dims(leaf.shape), *cells]))
        held = [sum_ + math.prod(shard) for sum_, shard in zip(held, shards, strict=True)]
        total += math.prod(leaf.shape)
    lines.append(_row(["**in all**", "", f"{total:,}", *(f"{count:,}" for count in held)]))
    return "\n".join(lines)


def generated() -> str:
    """All that stands between the markers, which are included."""
    tiny = load_config(pathlib.Path(__file__).parent.parent / "configs" / "tiny.py").model
    parts = [BEGIN, "### configs/tiny.py", table(tiny)]
    parts += ["### One dense layer, then two layers of experts", table(small_moe())]
    parts += ["### Latent attention with an indexer", table(small_indexed()), END]
    return "\n\n".join(parts)


def replace_section(text: str) -> str:
    """``text`` with what stands between its markers made anew."""
    before, rest = text.split(BEGIN, 1)
    return before + generated() + rest.split(END, 1)[1]


def _dims(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    page = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "docs/sharding.md")
    page.write_text(replace_section(page.read_text(encoding="utf-8")), encoding="utf-8")
