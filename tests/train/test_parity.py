"""n ranks equal one device for the whole transformer: loss and every gradient, as the trainer computes them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moedist.data.loader import Loader
from moedist.data.synthetic import SyntheticConfig
from moedist.mesh import Mesh
from moedist.model.contract import StepContext
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.balance.z_loss import ZLossConfig
from moedist.moe.bank.local import LocalConfig
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.moe.experts.grouped import GroupedConfig
from moedist.moe.report import StepCounts
from moedist.train.build import build_model
from moedist.train.config import RunConfig
from tests.ranks import Here
from tests.train.tiny import CONFIG, LENGTH, ROWS, changed, make_trainer

LAYOUTS = [*(pytest.param(*layout, marks=pytest.mark.slow) for layout in ((2, 2), (4, 1))), (4, 2), (4, 4)]
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5}
Reference = tuple[float, dict[str, Tensor]]
BARE = changed(CONFIG, train={"clip_norm": None})


@dataclasses.dataclass(frozen=True)
class Case:
    """One step.

    Attributes:
        config: as the ranks run it.
        accumulation: micro-batches per rank.
        cut: rows of a micro-batch of the reference where it is not the ranks': "sequence", "micro_step" or "same".
    """

    config: RunConfig
    accumulation: int
    cut: str = "same"


def cases(world: int, precision: str) -> Iterator[Case]:
    """Accumulation x recomputation x factor x dispatcher at the same cut into capacity groups: the half of the product
    that holds every three of them together, a part of it in fp32. Then other cuts."""
    policies = itertools.cycle(("probability", "choice", "token", "random"))
    experts = itertools.cycle((CONFIG.moe.experts, GroupedConfig(hidden_dim=12)))
    again = itertools.cycle(("full", "selective"))
    accumulations = (1, 4, 2) if world == 2 else (1, 4)  # (2 ranks, 2 and 4) and (4 ranks, 1) share micro-batches
    if precision == "fp32":
        accumulations = (4,)
    dispatchers = (AllToAllConfig(), PaddedConfig())
    for places in itertools.product(range(len(accumulations)), range(2), range(2), range(2)):
        if sum(places) % 2 > 0:
            continue
        accumulation, recompute = accumulations[places[0]], bool(places[1])
        factor, dispatch = (0.5, 1.0)[places[2]], dispatchers[places[3]]
        config = changed(
            BARE,
            train={"activation_checkpointing": next(again) if recompute else "none", "precision": precision},
            capacity={"factor": factor, "drop_policy": next(policies) if factor == 1.0 else "probability"},
            moe={"dispatch": dispatch, "experts": next(experts), "shared_hidden_dim": 6 if recompute else None},
            model={"tie_embeddings": recompute},
        )
        yield Case(config, accumulation)
    for accumulation, (scope, cut) in itertools.product(
        accumulations[:2], (("global", "micro_step"), ("sequence", "sequence"))
    ):
        balance = {"switch": SwitchConfig(0.3, scope), "z_loss": ZLossConfig(0.1)}
        config = changed(BARE, train={"precision": precision}, capacity={"group": "sequence"}, moe={"balance": balance})
        yield Case(config, accumulation, cut)


def steps_loader(world: int, accumulation: int, rank: int, micro_batch: int, num_rows: int) -> Loader:
    """Packed documents; the last two and a half of the step's ``num_rows`` rows are padding."""
    source = SyntheticConfig(
        vocab_size=37, num_tokens=20 * (num_rows * LENGTH - 40), document_length=9, jump_rate=0.3
    ).open()
    return Loader(
        source,
        "valid",
        sequence_length=LENGTH,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world,
        accumulation=accumulation,
    )


def one_device(config: RunConfig, num_rows: int, micro_batch: int) -> Reference:
    """Loss and gradients of one process that runs the micro-batches one after the other, with the plain twins."""
    spread = build_model(config, 37, Mesh.alone())
    batches = next(steps_loader(1, num_rows // micro_batch, 0, micro_batch, num_rows))
    assert any(not batch.valid_BS.any() for batch in batches) or micro_batch > ROWS
    num_tokens = torch.stack([batch.num_tokens() for batch in batches]).sum()
    num_targets = int(torch.stack([batch.num_targets() for batch in batches]).sum())
    total, counts = 0.0, StepCounts()
    for batch in batches:
        output = spread.model(batch, StepContext(config.seed, torch.tensor(0), num_tokens, True, counts))
        reports = (*output.reports, *output.attention_reports)
        counts = counts.after(reports)
        loss = cross_entropy(output.logits_BSV.flatten(0, 1), batch.target_BS.flatten(), reduction="sum") / num_targets
        total += loss.item()
        for report in reports:
            for name, value in report.losses.items():
                loss = loss + report.coefficients[name] * value
        loss.backward()
    return total, {name: parameter.grad for name, parameter in spread.model.named_parameters()}


def reference(case: Case, world: int, known: dict[str, Reference]) -> Reference:
    plain = changed(
        case.config, moe={"bank": LocalConfig(), "experts": CONFIG.moe.experts, "dispatch": AllToAllConfig()}
    )
    plain = changed(plain, train={"activation_checkpointing": "none"})
    micro_batch = {"same": ROWS, "sequence": 1, "micro_step": world * ROWS}[case.cut]
    num_rows = world * case.accumulation * ROWS
    key = f"{num_rows} {micro_batch} {plain}"
    if key not in known:
        known[key] = one_device(plain, num_rows, micro_batch)
    return known[key]


def gradients(here: Here, ep: int, precision: str) -> list[tuple[float, float, dict[str, Tensor], str]]:
    """Of every case, by the trainer's own step: loss, drop rate, gradients (on rank 0) and their hash on this rank."""
    mesh, results = here.mesh_of(ep), []
    for case in cases(here.world, precision):
        config = case.config
        loader = steps_loader(here.world, case.accumulation, here.rank, ROWS, here.world * case.accumulation * ROWS)
        trainer = make_trainer(config, config.data.open(), mesh)
        found: dict[str, Tensor] = {}

        def keep(
            optimizer: torch.optim.Optimizer, args: object, kwargs: object, found=found, model=trainer.model
        ) -> None:
            for name, parameter in model.named_parameters():
                grad = parameter.grad
                found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()

        trainer.engine.optimizer.register_step_pre_hook(keep)
        assert trainer.step(loader)
        total = trainer.tally.reduce(mesh.dp)
        asked, kept, *dropped = total.moe.count_LME.sum((0, 2)).tolist()
        assert asked == kept + sum(dropped)
        digest = hashlib.sha256(b"".join(found[name].numpy().tobytes() for name in sorted(found))).hexdigest()
        results.append((total.loss, 1 - kept / asked, found if here.rank == 0 else {}, digest))
    return results


@pytest.mark.parametrize("precision", ["fp64", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("world", "ep"), LAYOUTS)
def test_ranks_equal_one_device(ranks, world: int, ep: int, precision: str):
    by_rank = ranks(world).run(gradients, ep, precision, limit_s=300)
    known: dict[str, Reference] = {}
    for case, results in zip(cases(world, precision), zip(*by_rank, strict=True), strict=True):
        loss, drop_rate, got, _ = results[0]
        assert len({digest for *_, digest in results}) == 1, "ranks hold different sums"
        assert drop_rate > 0, "the suite must run with dropping on"
        expected_loss, expected = reference(case, world, known)
        tolerance = TOLERANCE[precision]
        assert abs(loss - expected_loss) <= tolerance * max(1.0, abs(expected_loss)), case
        assert got.keys() == expected.keys()
        for name, grad in expected.items():
            largest = grad.abs().max().item()
            difference = (got[name] - grad).abs().max().item()
            assert difference <= max(tolerance * largest, 1e-12), f"{name} differs by {difference:.2e}: {case}"
