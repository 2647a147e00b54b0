"""The table of docs/estimate.md: the recipes of published models on the ranks that they ask for.

python -m tests.docs.estimate_table            prints it
python -m tests.docs.estimate_table --write    puts it into docs/estimate.md
"""

from __future__ import annotations

import sys

from moedist.estimate.cluster import read_clusters
from moedist.estimate.describe import count
from moedist.estimate.estimate import estimate
from moedist.estimate.shape import ranks_of
from moedist.launch.compose import compose
from tests.docs.capacity_table import table
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "estimate.md"
BEGIN, END = "<!-- made by python -m tests.docs.estimate_table -->\n", "<!-- end -->\n"
RECIPES = ("mixtral_8x7b", "qwen3_30b_a3b", "olmoe_1b_7b", "deepseek_v3")
CLUSTER = "h100"


def text() -> str:
    """A row per recipe."""
    rows = []
    for name in RECIPES:
        config = compose([f"experiment={name}"]).config
        found = estimate(config, config.data.vocab_size, ranks_of(config), read_clusters()[CLUSTER])
        layout, per_second = found.layout, found.tokens_per_second
        rows.append(
            [
                f"`{name}`",
                count(found.shape.size.total),
                count(found.shape.size.active),
                f"{found.shape.flops_per_token / 1e9:.1f}",
                f"{layout.world} / {layout.ep} / {layout.fsdp or 'none'}",
                f"{found.memory.peak / 2**30:.1f}",
                f"{found.bytes_per_layer('per_pair') / 2**20:.0f}",
                f"{found.bytes_per_layer('per_rank') / 2**20:.0f}",
                f"{found.duration.exposed / found.duration.step:.0%}",
                f"{per_second / layout.world:,.0f}",
            ]
        )
    head = ["recipe", "parameters", "active", "GFLOP per token", "ranks / `mesh.ep` / `mesh.fsdp`", "GiB per rank"]
    head += ["all-to-all, MiB", "one copy per rank, MiB", "exposed", "tokens/s per rank"]
    return table(head, rows)


def main() -> None:
    """Prints the table, or puts it into the page."""
    if "--write" not in sys.argv[1:]:
        print(text(), end="")
        return
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{PAGE} has no place for the table"
    PAGE.write_text(before + begin + text() + end + after)


if __name__ == "__main__":
    main()
