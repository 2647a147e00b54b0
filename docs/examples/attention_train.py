"""A training loop of a mixture of attention experts, with a look at what its experts are used for.

python docs/examples/attention_train.py
"""

import torch

from moedist.nn import ExpertSpecializationMonitor, ExpertType, MoEAttention, MoEAttentionConfig


def main(num_epochs: int = 10, num_batches: int = 100, num_sequences: int = 8, length: int = 32) -> list[float]:
    """Learns to give zeros for uniform numbers of [0, 1); returns the mean loss of every epoch."""
    torch.manual_seed(0)
    attention = MoEAttention(
        MoEAttentionConfig(
            dim=64,
            num_heads=4,
            num_experts=3,
            expert_types=(ExpertType.STANDARD, ExpertType.HYPERBOLIC, ExpertType.LINEAR),
            router_hidden_dim=32,
        )
    )
    optimizer = torch.optim.AdamW(attention.parameters(), lr=1e-3)
    monitor = ExpertSpecializationMonitor(3)
    means = []
    for epoch in range(num_epochs):
        total = 0.0
        for _ in range(num_batches):
            output = attention(torch.rand(num_sequences, length, 64))
            task_loss = output.output.square().sum(-1).mean()
            loss = task_loss + output.aux_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.update(output.gates)
            total += loss.item()
        means.append(total / num_batches)
        print(f"epoch {epoch + 1:2d}  loss {means[-1]:.4f}")
        if (epoch + 1) % 5 == 0:
            statistics = monitor.get_statistics()
            for kind, gate in zip(attention.config.expert_types, statistics.avg_gates.tolist(), strict=True):
                print(f"          {kind.value:<12} mean gate {gate:.3f}")
    return means


if __name__ == "__main__":
    main()
