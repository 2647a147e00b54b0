"""The closed form of memory against torch's memory tracker: configurations that it was not made on.

python -m tests.estimate.checked    runs a step of each on fakes, and prints a table
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator

from moedist.estimate.cluster import read_clusters
from moedist.estimate.estimate import estimate
from moedist.estimate.fake_run import fake_run
from moedist.launch.compose import compose
from moedist.train.config import RunConfig

WORLD = 4
COMMON = ("experiment=null", "data=synthetic", "mesh.device=cpu")
CHECKED = {
    "top-1 of 64 two-matrix experts in fixed slots, bf16": (
        "data.vocab_size=32000 moe/dispatch=padded moe.experts.activation=relu moe.num_experts=64 moe.router.top_k=1 "
        "moe.experts.hidden_dim=1536 model.dim=768 model.attention.num_heads=12 model.layers.num_layers=6 "
        "train.sequence_length=1024 train.micro_batch=8 train.precision=bf16 mesh.ep=4"
    ),
    "8 of 128 narrow experts, a large vocabulary, bf16": (
        "data.vocab_size=151936 moe.num_experts=128 moe.router.top_k=8 moe.experts.hidden_dim=384 "
        "moe.capacity.factor=null model.dim=1024 model.attention.num_heads=16 model.attention.num_kv_heads=2 "
        "model.attention.head_dim=128 model.layers.num_layers=5 train.sequence_length=4096 train.micro_batch=1 "
        "train.precision=bf16 mesh.ep=4"
    ),
    "dense and MoE blocks in turn, one table, two replicas of FSDP, fp32": (
        "data.vocab_size=50304 moe.num_experts=8 moe.experts.hidden_dim=2048 model.dim=1536 "
        "model.attention.num_heads=12 model.layers.num_layers=8 model.layers.first_dense=2 model.layers.moe_every=2 "
        "model.tie_embeddings=true train.sequence_length=1024 train.micro_batch=4 mesh.ep=1 mesh.fsdp=2"
    ),
    "latent attention and a shared expert, FSDP, bf16": (
        "data.vocab_size=64000 model/attention=mla model.attention.num_heads=12 model.attention.query_rank=null "
        "model.attention.kv_rank=256 model.attention.head_dim=64 model.attention.rope_dim=32 "
        "model.attention.value_dim=64 moe.num_experts=24 moe.router.top_k=4 moe.experts.hidden_dim=704 "
        "moe.shared_hidden_dim=1408 moe.capacity.factor=null model.dim=1280 model.layers.num_layers=9 "
        "model.layers.first_dense=1 train.sequence_length=1024 train.micro_batch=6 train.precision=bf16 "
        "mesh.ep=2 mesh.fsdp=4"
    ),
    "limit per row, experts in a loop, two micro-steps, fp32": (
        "data.vocab_size=16384 moe/experts=loop moe.experts.activation=gelu moe.num_experts=16 "
        "moe.capacity.group=sequence moe.capacity.factor=1.5 moe.experts.hidden_dim=1024 model.dim=640 "
        "model.attention.num_heads=10 model.attention.qk_norm=null model.layers.num_layers=10 "
        "train.sequence_length=512 train.micro_batch=8 train.global_batch_tokens=32768 mesh.ep=2"
    ),
    "8 wide experts, fully sharded, long rows, bf16": (
        "data.vocab_size=32000 moe.num_experts=8 moe.experts.hidden_dim=7168 moe.capacity.factor=null model.dim=2048 "
        "model.attention.num_heads=16 model.attention.num_kv_heads=4 model.attention.qk_norm=null "
        "model.layers.num_layers=4 train.sequence_length=8192 train.micro_batch=1 train.precision=bf16 "
        "mesh.ep=4 mesh.fsdp=4"
    ),
}
"""Overrides by what they are about."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """Bytes by the closed form and as tracked."""

    closed: int
    tracked: int

    @property
    def error(self) -> float:
        """Of the closed form, as a share of what was tracked."""
        return self.closed / self.tracked - 1


def configured(name: str, checkpointing: str) -> RunConfig:
    again = f"train.activation_checkpointing={checkpointing}"
    return compose([*COMMON, *CHECKED[name].split(), again]).config


def compare(config: RunConfig) -> Compared:
    vocab_size = config.data.vocab_size
    closed = estimate(config, vocab_size, WORLD, read_clusters()["laptop"]).memory.peak
    return Compared(closed, fake_run(config, vocab_size, WORLD).peak)


def rows() -> Iterator[str]:
    """Of a Markdown table."""
    yield "| configuration | checkpointing | closed form, GiB | tracked, GiB | error |"
    yield "| --- | --- | --- | --- | --- |"
    for name in CHECKED:
        for checkpointing in ("none", "full"):
            found = compare(configured(name, checkpointing))
            sizes = f"{found.closed / 2**30:.2f} | {found.tracked / 2**30:.2f} | {found.error:+.1%}"
            yield f"| {name} | {checkpointing} | {sizes} |"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for row in rows():
        print(row, flush=True)
