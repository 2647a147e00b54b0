"""Four dense experts behind a dense router, two of them for each input.

python docs/examples/dense_four_experts.py
"""

import torch
from torch import nn

from moedist.nn import MoELayer


def build() -> MoELayer:
    """128 -> 128 with 264,196 parameters, of which an input meets about half."""
    experts = [nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU()) for _ in range(4)]
    return MoELayer(experts, nn.Linear(128, 4), 128, top_k=2, use_aux_loss=True, aux_loss_weight=0.01)


def main() -> None:
    """Shows it."""
    torch.manual_seed(0)
    layer = build()
    print(f"{layer.num_experts} experts, {layer.num_parameters():,} parameters")
    output = layer(torch.randn(32, 128))
    loss = output.square().mean() + layer.aux_loss_weight * layer.aux_loss
    loss.backward()
    print(f"output {list(output.shape)}, balance loss {layer.aux_loss.item():.4f}")
    for name, value in layer.get_auxiliary_loss_diagnostics().as_strings().items():
        print(f"{name:28s}{value}")


if __name__ == "__main__":
    main()
