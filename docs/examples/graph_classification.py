"""Which side does each member of Zachary's karate club take? The graph of friendships tells, from a few that are known.

The club of 34 split in two (Zachary 1977; networkx has the graph). A node's own vector is random and says nothing, the
sides of four members each are given, and the strength of a friendship is its edge's feature. Two graph layers find most
of the 26 others; without the friendships the same model guesses, and half of them are right.

Run: python docs/examples/graph_classification.py
"""

import networkx
import torch
from torch import nn
from torch.nn import functional as F

from moedist.model.attention.experts.edge_featured import EdgeFeaturedConfig
from moedist.model.attention.experts.hyperbolic import HyperbolicConfig
from moedist.model.attention.experts.standard import StandardConfig
from moedist.model.attention.mixture import MixtureConfig
from moedist.moe import pack_reports
from moedist.nn.gnn import MoEGNNLayer

KNOWN = torch.tensor([0, 1, 2, 5, 16, 23, 32, 33])  # the instructor (0), the president (33), and some of each side


def karate_club():
    """Adjacency [N, N], edge features [1, N, N, 1] and sides [N]."""
    graph = networkx.karate_club_graph()
    strength_NN = torch.tensor(networkx.to_numpy_array(graph), dtype=torch.float32)
    side_N = torch.tensor([int(graph.nodes[node]["club"] == "Officer") for node in graph])
    return strength_NN.ne(0), strength_NN[None, :, :, None] / strength_NN.max(), side_N


class Model(nn.Module):
    """Two graph layers between random vectors of the nodes and two scores."""

    def __init__(self, num_nodes, dim=64):
        super().__init__()
        attention = MixtureConfig(
            num_heads=2,
            experts=(
                EdgeFeaturedConfig(edge_dim=4),
                EdgeFeaturedConfig(edge_dim=4, mode="gatv2"),
                HyperbolicConfig(),
                StandardConfig(),
            ),
        )
        self.register_buffer("node_1ND", torch.randn(1, num_nodes, dim))
        self.layers = nn.ModuleList(MoEGNNLayer(dim, 1, attention, layer=index) for index in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2))
        self.head = nn.Linear(dim, 2)

    def forward(self, adjacency_NN, edges):
        """Scores [N, 2] and the balance losses."""
        x_1ND, reports = self.node_1ND, []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            output = layer(x_1ND, adjacency_NN, edges)
            x_1ND = norm(output.node_BND)
            reports.append(output.report)
        return self.head(x_1ND)[0], pack_reports(reports).objective()


def accuracy_of(adjacency_NN, edges, side_N, seed, steps=30):
    """Share of the 26 other members whose side is found."""
    torch.manual_seed(seed)
    model = Model(len(side_N))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        logits_NC, balance = model(adjacency_NN, edges)
        loss = F.cross_entropy(logits_NC[KNOWN], side_N[KNOWN]) + balance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    right_N = model(adjacency_NN, edges)[0].argmax(1) == side_N
    others = torch.ones_like(right_N).index_fill(0, KNOWN, False)
    return right_N[others].float().mean().item()


def main():
    """Prints the accuracy with the friendships, and without them."""
    adjacency_NN, edges, side_N = karate_club()
    for name, seen_NN in (("with", adjacency_NN), ("without", torch.zeros_like(adjacency_NN))):
        found = [accuracy_of(seen_NN, edges, side_N, seed) for seed in range(5)]
        print(f"{name} friendships: {sum(found) / len(found):.0%} right, the worst of five seeds {min(found):.0%}")


if __name__ == "__main__":
    main()
