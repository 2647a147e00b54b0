"""Four kinds of attention experts behind a router: one forward and one backward pass.

python docs/examples/attention_basic.py
"""

import torch

from moedist.nn import ExpertType, MoEAttention, MoEAttentionConfig, usage_loss


def main(num_sequences: int = 32, length: int = 128, dim: int = 512) -> MoEAttention:
    """All zeros: every router score ties, and ties go to the experts with the lowest ids."""
    torch.manual_seed(0)
    config = MoEAttentionConfig(
        dim=dim,
        num_heads=8,
        num_experts=4,
        top_k=2,
        expert_types=(ExpertType.STANDARD, ExpertType.HYPERBOLIC, ExpertType.LINEAR, ExpertType.EDGE_FEATURED),
        router_temperature=1.0,
        load_balance_coef=0.01,
    )
    attention = MoEAttention(config)
    output = attention(torch.zeros(num_sequences, length, dim))
    (output.output.square().mean() + output.aux_loss).backward()
    print(f"Output shape: {list(output.output.shape)}")
    print(f"Auxiliary loss: {config.load_balance_coef * usage_loss(output.gates).item():.6f} from the gates alone,")
    print(f"                {output.aux_loss.item():.6f} as Switch Transformer has it, which training uses")
    print(f"Number of parameters: {attention.num_parameters()}")
    finite = all(parameter.grad.isfinite().all() for parameter in attention.parameters())
    print(f"All gradients finite: {finite}")
    return attention


if __name__ == "__main__":
    main()
