"""A program for two ranks: trains a model of DeepSpeed's own MoE layers and lets its engine save.

Also saves, from the live model, what a reader should find: every parameter by name, experts by global id.

    torchrun --nproc-per-node=2 -m tests.reference.deepspeed_checkpoint FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

DIM, HIDDEN, EXPERTS, EP = 8, 12, 12, 2
FACTOR = 12.0  # nothing is dropped


class TwoMatrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class ThreeMatrices(nn.Module):
    """As Mixtral and Llama name them."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (
            nn.Linear(*size, bias=False) for size in ((DIM, HIDDEN), (HIDDEN, DIM), (DIM, HIDDEN))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, expert: nn.Module) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.norm = nn.LayerNorm(DIM)
        self.ffn = MoE(
            DIM,
            expert,
            num_experts=EXPERTS,
            ep_size=EP,
            k=2,
            capacity_factor=FACTOR,
            eval_capacity_factor=FACTOR,
            min_capacity=0,
            top2_2nd_expert_sampling=False,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ffn(self.norm(x))[0]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(TwoMatrices()), Block(ThreeMatrices())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def main(folder: Path) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", dist_init_required=True)
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    rank = dist.get_rank()
    torch.manual_seed(rank)  # experts of the two ranks must differ
    model = Model()
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    for step in range(2):
        x = torch.randn(4, 6, DIM, generator=torch.Generator().manual_seed(10 * step + rank))
        loss = engine(x).square().mean()
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(folder / "saved"), tag="step2")
    found = {}
    for name, parameter in engine.module.named_parameters():
        place = ".deepspeed_experts."
        if place in name:
            before, _, after = name.partition(place)
            local, _, rest = after.partition(".")
            name = f"{before}{place}{int(local) + rank * EXPERTS // EP}.{rest}"
        found[name] = parameter.detach().clone()
    engine.eval()
    x = torch.randn(4, 6, DIM, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        found |= {"x": x, "y": engine(x)}
    torch.save(found, folder / f"expected_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
