"""A block of one's own whose attention is a mixture of experts, in a model that learns to copy.

python docs/examples/transformer.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moedist.nn import ExpertType, MoEAttention, MoEAttentionConfig

WORDS, DIM = 16, 32


class Block(nn.Module):
    """Pre-norm: ``x + attention(norm(x))``, then ``x + ffn(norm(x))``."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        kinds = (ExpertType.STANDARD, ExpertType.STANDARD, ExpertType.HYPERBOLIC, ExpertType.LINEAR)
        config = MoEAttentionConfig(dim=DIM, num_heads=4, expert_types=kinds, router_hidden_dim=32, dropout=0.0)
        self.attention = MoEAttention(config, layer=layer)
        self.ffn = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]; a position sees none after it."""
        x = x + self.attention(self.attention_norm(x), causal=True).output
        return x + self.ffn(self.ffn_norm(x))


class Model(nn.Module):
    """Words and places in, scores of the next word out."""

    def __init__(self, length: int, num_layers: int = 2) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, DIM), nn.Embedding(length, DIM)
        self.blocks = nn.Sequential(*(Block(layer) for layer in range(num_layers)))
        self.head = nn.Linear(DIM, WORDS)

    def forward(self, word: Tensor) -> Tensor:
        """[B, S] -> [B, S, WORDS]."""
        place = torch.arange(word.shape[1], device=word.device)
        return self.head(self.blocks(self.words(word) + self.places(place)))


def main(num_steps: int = 300, half: int = 8) -> tuple[float, float]:
    """The second half of each text is its first; returns the loss there before and after."""
    torch.manual_seed(0)
    model = Model(2 * half)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = last = 0.0
    for step in range(num_steps):
        text = torch.randint(WORDS, (32, half)).repeat(1, 2)
        score = model(text[:, :-1])
        task_loss = F.cross_entropy(score[:, half - 1 :].flatten(0, 1), text[:, half:].flatten())
        balance = sum(block.attention.get_aux_loss() for block in model.blocks)
        optimizer.zero_grad()
        (task_loss + balance).backward()
        optimizer.step()
        last = task_loss.item()
        first = first if step else last
        if step % 50 == 0 or step == num_steps - 1:
            print(f"step {step:3d}  loss {last:.4f}")
    return first, last


if __name__ == "__main__":
    main()
