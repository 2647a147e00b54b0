"""The table of docs/dispatch.md: bytes of a token by the closed forms.

python -m tests.docs.dispatch_table            prints it
python -m tests.docs.dispatch_table --write    puts it into docs/dispatch.md
"""

from __future__ import annotations

import sys

from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.hierarchical import HierarchicalConfig
from moedist.moe.dispatch.traffic import Batch, share_reached
from tests.docs.capacity_table import table
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "dispatch.md"
BEGIN, END = "<!-- made by python -m tests.docs.dispatch_table -->\n", "<!-- end -->\n"
TOKENS = 4096
CHOICES = {
    "`all_to_all`": AllToAllConfig(),
    "`once_per: rank`": HierarchicalConfig(once_per="rank"),
    "`once_per: node`": HierarchicalConfig(),
}
# Name, experts, choices, width; nodes and ranks of an expert-parallel group.
ROWS = (
    ("mixtral_8x7b", 8, 2, 4096, 2, 4),
    ("olmoe_1b_7b", 64, 8, 2048, 2, 8),
    ("olmoe_1b_7b", 64, 8, 2048, 8, 8),
    ("qwen3_30b_a3b", 128, 8, 2048, 4, 8),
    ("DeepSeek-V3", 256, 8, 7168, 8, 8),
)


def text() -> str:
    """One row per model and layout, one column per dispatcher."""
    rows = []
    for name, num_experts, top_k, dim, nodes, ranks in ROWS:
        batch = Batch(TOKENS, dim, num_experts, top_k, capacity=None, ep=nodes * ranks, nodes=nodes)
        copies = share_reached(num_experts, top_k, num_experts // nodes) * (nodes - 1)
        cells = [name, f"{num_experts}, {top_k}, {dim}", f"{nodes} x {ranks}"]
        cells.append(f"{top_k * (nodes - 1) / nodes:.2f} / {copies:.2f}")
        for choice in CHOICES.values():
            traffic = choice.traffic(batch)
            cells.append(f"{traffic.across / TOKENS / 1e3:.1f} / {traffic.inside / TOKENS / 1e3:.1f}")
        rows.append(cells)
    return table(["model", "E, K, D", "nodes x ranks", "copies that cross: all / once", *CHOICES], rows)


def main() -> None:
    """Prints the table, or writes it."""
    if "--write" in sys.argv[1:]:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text()}\n{END}{rest.partition(END)[2]}")
    else:
        print(text())


if __name__ == "__main__":
    main()
