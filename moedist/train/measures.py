"""What a run measures of itself, from the start of a step to the record of it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moedist.engine.contract import GradientOf
from moedist.log.metrics import ATTENTION, moe_metrics, time_metrics, train_metrics
from moedist.log.sink.contract import Value
from moedist.mesh import Mesh
from moedist.mesh.meter import ExchangeMeter, measuring
from moedist.model.attention.mixture import AttentionMixture
from moedist.model.contract import ModelOutput
from moedist.moe.layer import MoE, routing_label
from moedist.moe.report import PackedReports, pack_reports
from moedist.moe.routed import RoutedLayer
from moedist.parallel.expert_norms import ExpertNorms
from moedist.train.build import MATMUL_DTYPES, SpreadModel
from moedist.train.clock import PARTS, StepClock
from moedist.train.config import RunConfig
from moedist.train.spill import may_spill
from moedist.train.tally import StepSum, Tally
from moedist.train.throughput import measured_peak_flops, peak_memory


class Measures:
    """One rank's numbers, and how they become a record of all ranks: one sum and one maximum over them.

    What costs more than an addition is measured in recorded steps only. Until the record is asked for nothing here
    makes the host wait for a device.

    Attributes:
        tally: what the step adds up to.
        attention_tally: the same of attentions that route; its loss is 0.
        mixtures: these attentions.
        spilled_steps: since the last record, of those that were thrown away and run again for want of room.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, spread: SpreadModel):
        self.config, self.mesh, self.spread = config, mesh, spread
        self.moe_layers = [module for module in spread.model.modules() if isinstance(module, MoE)]
        self.mixtures = [module for module in spread.model.modules() if isinstance(module, AttentionMixture)]
        self.tally = self._tally(spread.model.moe_blocks, config.moe.num_experts)
        experts = self.mixtures[0].config.num_experts if self.mixtures else 0
        self.attention_tally = self._tally(spread.model.attention_blocks, experts)
        self.clock = StepClock(mesh.device)
        self._norms = ExpertNorms(self.moe_layers, spread.model, spread.gradients)
        self._label, self._may_spill = routing_label(spread.model), may_spill(spread.model)
        self.peak_flops: float | None = None
        self.spilled_steps = 0
        self._seconds, self._tokens = 0.0, 0  # of the steps since the last record
        self._recorded = False
        self._meter: ExchangeMeter | None = None
        self._square_LE: dict[str, Tensor] = {}

    def _tally(self, blocks: tuple[int, ...], num_experts: int) -> Tally:
        return Tally(blocks, torch.zeros(len(blocks), num_experts, dtype=torch.int64, device=self.mesh.device))

    @property
    def routed_layers(self) -> list[RoutedLayer]:
        """MoE layers, then attentions that route."""
        return [*self.moe_layers, *self.mixtures]

    @property
    def families(self) -> tuple[tuple[Sequence[RoutedLayer], Tally], ...]:
        """Layers whose loads are one table, and what their step adds up to."""
        return (self.moe_layers, self.tally), (self.mixtures, self.attention_tally)

    def counters(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the counts."""
        counters = {"last_seen": self.tally.last_seen_LE}
        return counters | ({"attention_last_seen": self.attention_tally.last_seen_LE} if self.mixtures else {})

    def share_counters(self) -> None:
        """Makes `counters` those of all ranks; called by all."""
        self.tally.share_last_seen(self.mesh.dp)
        if self.mixtures:
            self.attention_tally.share_last_seen(self.mesh.dp)

    def clear(self) -> None:
        """Begins a step."""
        for _, tally in self.families:
            tally.clear()

    def pack(self, output: ModelOutput) -> tuple[PackedReports | None, PackedReports | None]:
        """The reports of a micro-step, of MoE layers and of attentions; None where there are none."""
        reports, attention_reports = output.reports, output.attention_reports
        return (
            pack_reports(reports) if reports else None,
            pack_reports(attention_reports) if attention_reports else None,
        )

    def add(self, task_loss: Tensor, reports: tuple[PackedReports | None, PackedReports | None]) -> None:
        """One micro-step: this rank's share of the task loss, and `pack`."""
        self.tally.add(task_loss, reports[0])
        if self.mixtures:
            self.attention_tally.add(torch.zeros_like(task_loss), reports[1])

    def measure_peak(self) -> None:
        """Sets what MFU is measured against: the given peak, or what all ranks reach now; called by all."""
        given = self.config.log.peak_tflops
        if given is not None:
            self.peak_flops = given * 1e12 * self.mesh.dp.size
            return
        self.peak_flops = measured_peak_flops(self.mesh, MATMUL_DTYPES[self.config.train.precision])

    @contextlib.contextmanager
    def step(self, recorded: bool) -> Iterator[None]:
        """Around a step; ``recorded`` where a record of it will be asked for."""
        start = time.perf_counter()
        self._recorded, self._square_LE = recorded, {}
        self._meter = ExchangeMeter(self.mesh.device) if recorded else None
        self.clock.begin(measured=recorded)
        with measuring(self._meter):
            yield
        self.clock.enter("other")
        self._seconds += time.perf_counter() - start

    def saw(self, step: int, num_tokens: int) -> None:
        """Step ``step`` has trained on so many valid tokens, of all ranks."""
        for _, tally in self.families:
            tally.see(step)
        self._tokens += num_tokens

    def gradients_summed(self, gradient_of: GradientOf) -> None:
        """Gradients are those of the global batch, and not yet clipped; called by all ranks."""
        if not self._recorded or not self.moe_layers:
            return
        measured: Mapping[str, GradientOf] = {"weight_norm": lambda parameter: parameter, "grad_norm": gradient_of}
        for name, of in measured.items():
            if (square_LE := self._norms.squares(of)) is not None:
                self._square_LE[name] = square_LE

    def record(self, step: int, tokens: int, learning_rates: Mapping[str, float], grad_norm: float) -> dict[str, Value]:
        """The record of the step just done; called by all ranks. The one place where the host waits for numbers.

        Args:
            step: optimizer steps done.
            tokens: valid tokens trained on since step 0.
            learning_rates: by parameter group.
            grad_norm: of the whole model before the clip.
        """
        total = self._reduce()
        tokens_per_s = self._tokens / max(self._seconds, 1e-9)
        record = train_metrics(
            step=step,
            loss=total.loss,
            tokens=tokens,
            tokens_per_s=tokens_per_s,
            learning_rates=learning_rates,
            grad_norm=grad_norm,
            memory_gib=float(total.extra["memory"]) / 2**30,
            data_wait=float(total.extra["data_s"]) / self.mesh.dp.size / max(self._seconds, 1e-9),
            flops_per_token=self.spread.flops_per_token,
            peak_flops=self.peak_flops,
            spilled_steps=self.spilled_steps if self._may_spill else None,
        )
        self._seconds, self._tokens, self.clock.data_s, self.spilled_steps = 0.0, 0, 0.0, 0
        if "seconds" in total.extra:
            record |= time_metrics(
                seconds=dict(zip((*PARTS, "exchange"), total.extra["seconds"].tolist(), strict=True)),
                most_compute_s=float(total.extra["most_compute_s"]),
                bytes_sent=int(total.extra["bytes_sent"]),
                bytes_arrived=int(total.extra["bytes_arrived"]),
                most_bytes_arrived=int(total.extra["most_bytes_arrived"]),
                num_ranks=self.mesh.dp.size,
            )
        if total.moe is not None:
            record |= moe_metrics(total.moe, step, self.config.log.dead_window)
        if self.mixtures and (mixed := self.attention_tally.reduce(self.mesh.dp).moe) is not None:
            mixed = dataclasses.replace(mixed, bias_LE=self._bias(self.mixtures))
            record |= moe_metrics(mixed, step, self.config.log.dead_window, ATTENTION)
        if self._label is not None:
            record["moe/routing"] = self._label
        return record

    def _reduce(self) -> StepSum:
        """All numbers of the step over all ranks."""
        device = self.mesh.device
        sums = {"data_s": torch.tensor(self.clock.data_s, device=device, dtype=torch.float64)}
        maxima = {"memory": torch.tensor(peak_memory(device), device=device, dtype=torch.float64)}
        seconds = self.clock.seconds()
        if seconds is not None and self._meter is not None:
            exchange_s = self._meter.seconds
            own_s = seconds["compute"] - exchange_s
            rows = [*(seconds | {"compute": own_s}).values(), exchange_s]
            sums["seconds"] = torch.tensor(rows, device=device, dtype=torch.float64)
            sums["bytes_sent"] = torch.tensor(self._meter.bytes_sent, device=device)
            sums["bytes_arrived"] = torch.tensor(self._meter.bytes_arrived, device=device)
            maxima["most_bytes_arrived"] = sums["bytes_arrived"]
            maxima["most_compute_s"] = torch.tensor(own_s, device=device, dtype=torch.float64)
        total = self.tally.reduce(self.mesh.dp, sums | self._square_LE, maxima)
        if total.moe is None:
            return total
        norm_LE = {name: total.extra[name].sqrt() for name in self._square_LE}
        bias_LE = self._bias(self.moe_layers)
        return dataclasses.replace(total, moe=dataclasses.replace(total.moe, bias_LE=bias_LE, norm_LE=norm_LE))

    def _bias(self, layers: Sequence[RoutedLayer]) -> Tensor | None:
        """[L, E]: the selection bias, equal on all ranks; None where no layer has one."""
        biases = [layer.router.selection_bias for layer in layers]
        if all(bias is None for bias in biases):
            return None
        zero_E = torch.zeros(layers[0].config.num_experts, device=self.mesh.device)
        return torch.stack([zero_E if bias is None else bias for bias in biases]).cpu()
