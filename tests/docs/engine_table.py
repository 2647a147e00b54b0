"""The table of docs/engines.md: every engine and layout against one device. Minutes on a quiet machine.

python -m tests.docs.engine_table            prints it
python -m tests.docs.engine_table --write    puts it into docs/engines.md
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from moedist.engine.deepspeed import DeepSpeedConfig
from moedist.moe.router.topk import TopKConfig
from moedist.train.config import RunConfig
from tests.docs.capacity_table import table
from tests.docs.pages import ROOT
from tests.ranks import Here, RankPool
from tests.train.measure import (
    WORLD,
    Steps,
    on_global_batch,
    on_one_device,
    run_steps,
    whole,
    worst_gradient,
    worst_loss,
    worst_norm,
)
from tests.train.tiny import CONFIG, changed, make_trainer

PAGE = ROOT / "docs" / "engines.md"
BEGIN, END = "<!-- made by python -m tests.docs.engine_table -->\n", "<!-- end -->\n"
STEPS = 20
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 0.15}
"""What a figure may be, in the units of its column: sums are in another order, and bf16 has 8 bits. (Weights
that are cut are gathered in it, and so is the residual stream; autocast keeps both in fp32.)"""


@dataclasses.dataclass(frozen=True)
class Row:
    """One run of 4 ranks.

    Attributes:
        engine: its kind.
        weights: where dense weights lie, as the page says it.
        ep, fsdp, precision: of the run.
    """

    engine: str
    weights: str
    ep: int
    precision: str
    fsdp: int | None = None

    def config(self) -> RunConfig:
        """Dropping, noise and the clip are on; in bf16 every token runs through every expert, because a score that is
        rounded otherwise sends a token elsewhere, and that is no matter of engines."""
        config = on_global_batch(changed(CONFIG, train={"precision": self.precision, "steps": STEPS}), accumulation=1)
        if self.precision != "bf16":
            return config
        return changed(config, capacity={"factor": None}, moe={"router": TopKConfig(mode="dense")})


def native_rows() -> list[Row]:
    layouts = [("replicated", None, (1, 2, 4)), ("FSDP2", WORLD, (1, 2, 4)), ("HSDP, 2 x 2", 2, (1, 2))]
    return [
        Row("native", weights, ep, precision, fsdp)
        for precision in TOLERANCE
        for weights, fsdp, sizes in layouts
        for ep in (sizes if precision == "fp64" else sizes[-1:])
    ]


def native_steps(here: Here, row: Row) -> Steps:
    """What a rank of the row sees; only rank 0 sends tensors home."""
    config = row.config()
    steps = run_steps(make_trainer(config, config.data.open(), here.mesh_of(row.ep, row.fsdp)), STEPS)
    return steps if here.rank == 0 else Steps({}, {}, steps.losses, steps.norms, {})


def deepspeed_rows() -> list[Row]:
    return [
        Row("deepspeed", f"ZeRO {stage}", ep, precision)
        for precision in ("fp32", "bf16")
        for stage in (0, 1, 2)
        for ep in (1, 2, 4)
    ]


def deepspeed_steps(here: Here, row: Row) -> Steps:
    """The same below torchrun's environment, as DeepSpeed demands it; its gradients are summed before the step."""
    os.environ.setdefault("LOCAL_RANK", str(here.rank))
    engine = DeepSpeedConfig(zero_stage=int(row.weights.removeprefix("ZeRO ")))
    config = dataclasses.replace(row.config(), engine=engine)
    trainer = make_trainer(config, config.data.open(), here.mesh_of(row.ep))
    grads: dict[str, Tensor] = {}
    step = trainer.engine.step

    def show_and_step(*summed: Any) -> float:
        if not grads:
            from deepspeed.utils import safe_get_full_grad

            for name, parameter in trainer.model.named_parameters():
                grads[name] = whole(trainer.engine.layout.show(name, safe_get_full_grad(parameter)))
        return step(*summed)

    trainer.engine.step = show_and_step  # type: ignore[method-assign]
    with contextlib.closing(trainer.engine):
        steps = run_steps(trainer, STEPS)
    return Steps({}, grads if here.rank == 0 else {}, steps.losses, steps.norms, {})


ENGINES: dict[str, tuple[Callable[[], list[Row]], Callable[[Here, Row], Steps]]] = {
    "native": (native_rows, native_steps),
    "deepspeed": (deepspeed_rows, deepspeed_steps),
}
"""By kind: the rows of an engine, and what runs one on a rank."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """The row's worst differences from one device of the same precision, see `tests.train.measure`."""

    row: Row
    loss: float
    gradient: float
    norm: float
    same_norm: bool


def measure(rows: list[Row] | None = None) -> list[Figures]:
    """Runs the rows (all that there are) one after the other."""
    pool, references, figures = RankPool(WORLD), {}, []
    try:
        for engine_rows, run in ENGINES.values():
            for row in engine_rows():
                if rows is not None and row not in rows:
                    continue
                if row.precision not in references:
                    references[row.precision] = on_one_device(row.config(), STEPS)
                expected = references[row.precision]
                got, *others = pool.run(run, row, limit_s=900)
                figures.append(
                    Figures(
                        row,
                        worst_loss(got, expected),
                        worst_gradient(got, expected),
                        worst_norm(got, expected),
                        all(other.norms == got.norms for other in others),
                    )
                )
    finally:
        pool.close()
    return figures


def text(figures: list[Figures]) -> str:
    """What stands between the marks of the page."""
    return table(
        ["engine", "dense weights", "EP", "dtype", "loss, 20 steps", "gradient", "norm", "one norm on all ranks"],
        [
            [
                f"`{each.row.engine}`",
                each.row.weights,
                str(each.row.ep),
                each.row.precision,
                *(f"{value:.0e}" for value in (each.loss, each.gradient, each.norm)),
                "yes" if each.same_norm else "no",
            ]
            for each in figures
        ],
    )


def main() -> None:
    """Prints the table, or writes it."""
    warnings.simplefilter("ignore")
    made = text(measure())
    if "--write" in sys.argv[1:]:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}")
    else:
        print(made)


if __name__ == "__main__":
    main()
