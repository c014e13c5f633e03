"""DeepSeek-Coder-6.7B's shape and schedule (Guo et al. 2024, arXiv 2401.14196) with embeddings of the syntax.

    dsjax data build repositories/ corpus
    dsjax plan configs/coder/full_size.py --topology v5e:16x16
    dsjax train configs/coder/full_size.py --run runs/coder_full_size

What the structure adds in parameters its feed-forward layers have less, as in the small configs beside this one.
``dsjax plan configs/coder/full_size.py model.structure=none`` is its plain peer.

Result: not yet run; planned in docs/plan.md.
"""

from embeddings import matched

from dsjax.checkpoint import CheckpointConfig
from dsjax.data.corpus import Source
from dsjax.data.prepare import DataConfig
from dsjax.models.decoder import ComputeConfig, DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.structure import StructureConfig
from dsjax.sharding import MeshConfig
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import Pretrain, TrainConfig


def get_config() -> Pretrain:
    attention = AttentionConfig(num_heads=32, num_kv_heads=32, head_dim=128)
    plain = DecoderConfig(
        vocab_size=32_256,
        d_model=4096,
        num_layers=32,
        groups=(LayerGroup(MLPConfig(d_ff=11_008), attention),),
    )
    return Pretrain(
        model=matched(plain, StructureConfig()),
        data=DataConfig(sources=(Source("corpus"),), vocab_size=32_256, seq_len=4096, batch_size=2304),
        optim=OptimConfig(lr=4.2e-4, warmup_steps=2000, schedule="cosine", final_lr_share=0.1),
        train=TrainConfig(steps=212_000, accumulate=3),  # two trillion tokens
        compute=ComputeConfig(dtype="bfloat16", remat="full", loss_chunk=512),
        mesh=MeshConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(every=1000),
    )
