"""The tables of docs/routing.md that are numbers: limits by the public formulas, and who stays under each policy.

python -m tests.docs.capacity_table            prints them
python -m tests.docs.capacity_table --write    puts them into docs/routing.md
"""

from __future__ import annotations

import itertools
import sys
import warnings

import torch

from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.plan import plan_capacity
from tests.docs.pages import ROOT
from tests.moe.by_hand import kept, preset_config, route_logits

PAGE = ROOT / "docs" / "routing.md"
BEGIN, END = "<!-- made by python -m tests.docs.capacity_table -->\n", "<!-- end -->\n"
PRESETS = ("default", "switch", "gshard", "deepspeed_top2", "megatron", "st_moe")
SIZES = ((8, 8), (100, 10), (257, 16), (4096, 64), (8192, 160))
# Six tokens with two choices each, room for three pairs per expert; each policy keeps other pairs.
PROBS = [[0.3, 0.6, 0.1], [0.4, 0.45, 0.15], [0.3, 0.6, 0.1], [0.6, 0.25, 0.15], [0.4, 0.5, 0.1], [0.6, 0.3, 0.1]]
ROOM = 3
POLICIES = ("probability", "gate", "choice", "token", "random")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def limits() -> str:
    """One row per preset, one column per number of tokens and experts."""
    rows = []
    for name in PRESETS:
        moe = preset_config(name)
        config, limit = moe.capacity, moe.capacity.limit(training=True)
        assert limit is not None
        keys = f"factor {config.factor}, {config.base}, {config.rounding}, at least {config.min_capacity}"
        values = [str(limit.of_shape(t, moe.router.top_k, e)) for t, e in SIZES]
        rows.append([f"`{name}`", str(moe.router.top_k), keys, *values])
    return table(["preset", "K", "rule", *(f"{t} tokens, {e} experts" for t, e in SIZES)], rows)


def stays() -> str:
    """One row per policy and overflow, one column per expert: the tokens that it computes, slot by slot."""
    ctx = TokenContext.of_rows(1, len(PROBS))
    routing = route_logits(torch.tensor(PROBS, dtype=torch.float64).log(), ctx, top_k=2)
    rows = []
    for overflow, policy in itertools.product(("drop", "next_best"), POLICIES):
        config = CapacityConfig(expert_capacity=ROOM, drop_policy=policy, overflow=overflow)
        plan = plan_capacity(routing, ctx, config)
        pairs = sorted(kept(plan), key=lambda pair: pair[2])
        experts = [" ".join(str(token) for token, e, _ in pairs if e == expert) or "-" for expert in range(3)]
        rows.append([f"`{policy}`", f"`{overflow}`", *experts, str(int(plan.dropped_ME.sum()))])
    return table(["`drop_policy`", "`overflow`", "expert 0", "expert 1", "expert 2", "pairs lost"], rows)


def text() -> str:
    """What stands between the marks of the page."""
    probs = "; ".join(f"token {token}: {', '.join(map(str, row))}" for token, row in enumerate(PROBS))
    return (
        f"Slots of one expert, by the keys of each preset:\n\n{limits()}\n"
        f"Who stays, with two choices per token and room for {ROOM} pairs per expert ({probs}):\n\n{stays()}"
    )


def main() -> None:
    """Prints the tables, or writes them."""
    warnings.simplefilter("ignore")
    if "--write" in sys.argv[1:]:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text()}\n{END}{rest.partition(END)[2]}")
    else:
        print(text())


if __name__ == "__main__":
    main()
