"""A training loop with a monitor: four kinds of input, each with a map of its own, and experts that part them.

python docs/examples/training_loop.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moedist.nn import (
    ExpertSpecializationMonitor,
    MoELayer,
    MoELayerConfig,
    MoELoss,
    MoEOptimizerConfig,
    training_step,
)

KINDS, WIDTH = 4, 16


class Task:
    """Inputs lie around one of four centres; the target is a linear map that belongs to the centre."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.centres = 3 * torch.randn(KINDS, WIDTH, generator=generator)
        self.maps = torch.randn(KINDS, WIDTH, WIDTH, generator=generator) / WIDTH**0.5

    def batch(self, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs [size, WIDTH], targets, and the kind of each."""
        generator = torch.Generator().manual_seed(seed)
        kind = torch.randint(KINDS, (size,), generator=generator)
        near = torch.randn(size, WIDTH, generator=generator)
        return self.centres[kind] + near, torch.einsum("td,tdf->tf", near, self.maps[kind]), kind


def train(steps: int, size: int = 256) -> tuple[list[float], float, ExpertSpecializationMonitor]:
    """Losses, held-out loss, and the monitor of the last fifth of the steps."""
    torch.manual_seed(0)
    task = Task()
    config = MoELayerConfig(num_experts=KINDS, in_features=WIDTH, hidden_features=32, top_k=2)
    layer = MoELayer.from_config(config)
    model = nn.Sequential(layer, nn.Linear(WIDTH, WIDTH))
    settings = MoEOptimizerConfig(router_lr=1e-2, experts_lr=5e-3, output_lr=5e-3)
    optimizer, loss = settings.build(model, output=model[1]), MoELoss(F.mse_loss)
    monitor, losses = ExpertSpecializationMonitor(layer.num_experts), []
    for step in range(steps):
        x, target, _ = task.batch(size, seed=step)
        losses.append(training_step(model, x, target, loss, optimizer, max_norm=settings.max_norm))
        if step >= steps - max(steps // 5, 1):
            monitor.update(layer)
    model.eval()
    x, target, _ = task.batch(1024, seed=10**6)
    with torch.no_grad():
        return losses, F.mse_loss(model(x), target).item(), monitor


def main() -> None:
    """Shows it."""
    losses, held_out, monitor = train(steps=600)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, held out {held_out:.3f}")
    stats = monitor.get_statistics()
    print("tokens of a step by expert", [round(value) for value in stats.avg_usage.tolist()])
    print("mean gate by expert       ", [round(value, 2) for value in stats.avg_gates.tolist()])
    print("\n".join(monitor.warnings()) or "nothing to warn of")


if __name__ == "__main__":
    main()
