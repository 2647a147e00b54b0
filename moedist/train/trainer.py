"""The loop: RUN until the last step or a request to stop, then SAVE, then leave."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moedist.data.contract import Source
from moedist.data.loader import Loader
from moedist.log.alerts import Alert
from moedist.log.run_log import RunLog
from moedist.log.sink.contract import Value
from moedist.mesh import Mesh
from moedist.mesh.collectives import all_sum
from moedist.model.batch import TokenBatch
from moedist.model.contract import StepContext
from moedist.model.loss import token_loss
from moedist.moe.record import RoutingRecorder
from moedist.moe.report import StepCounts
from moedist.moe.trace import TraceError, write_part
from moedist.train.build import SpreadModel, autocast, build_engine
from moedist.train.checkpoint import BackgroundSave, CheckpointStore, DiskError
from moedist.train.config import RunConfig
from moedist.train.evaluate import evaluate
from moedist.train.measures import Measures
from moedist.train.phases import PhaseRecorder, chrome_trace, find_straggler, write_phases
from moedist.train.signals import StopRequest
from moedist.train.spill import Spill, may_spill
from moedist.train.watchdog import Watchdog

WATCHDOG_MARGIN_S = 30.0
"""Seconds after a collective's own time-out: it shall raise first, with the better message."""
LAST_SAVE_S = 15.0
"""Seconds that a failing rank waits for its save in the background: less than launchers give before they kill."""


class NonFiniteError(RuntimeError):
    """The loss or its gradient is no number any more; the model is as it was before the step."""


@dataclasses.dataclass
class Progress:
    """How far a run is; the part of its state that is no tensor.

    Attributes:
        run_id, group_id, began_step: who the run is, also in trackers (`moedist.train.identity.Identity`).
        step: optimizer steps taken.
        tokens: valid tokens trained on.
        next_sample: the data's state, together with the seed.
    """

    run_id: str
    group_id: str = ""
    began_step: int = 0
    step: int = 0
    tokens: int = 0
    next_sample: int = 0


@dataclasses.dataclass(frozen=True)
class Totals:
    """What all ranks agree on before a step's first backward: one small reduce."""

    num_targets: int
    num_tokens: int
    stop: bool
    save_failed: bool


class Trainer:
    """One rank of a run."""

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        source: Source,
        spread: SpreadModel,
        store: CheckpointStore,
        stop: StopRequest,
        watchdog: Watchdog,
        progress: Progress,
        meta: Mapping[str, Any],
        traces: Path | None = None,
    ):
        self.config, self.mesh, self.source, self.spread = config, mesh, source, spread
        self.store, self.stop, self.watchdog, self.progress, self.meta = store, stop, watchdog, progress, meta
        self.traces = traces
        self.model = spread.model
        self.recorder = RoutingRecorder(self.model)
        self.may_spill = may_spill(self.model)
        self.engine = build_engine(config, spread, mesh)
        self.measures = Measures(config, mesh, spread)  # of the parameters that the engine has made of the model's
        self.tally = self.measures.tally
        self.phases = PhaseRecorder(mesh)
        self.grad_norm = math.nan
        started_at = os.environ.get("MOEDIST_STARTED_AT")
        self.waiting_since = None if started_at is None else float(started_at)
        self.eval_loss: float | None = None
        self.last_record: Mapping[str, Value] = {}
        self.saving: BackgroundSave | None = None
        self.save_failed = False  # on some rank, as all of them know
        self.saved_step: int | None = None

    def enter(self, phase: str, slow: bool = False) -> None:
        """Tells watchdog, clock and phases what this rank does now; ``slow`` where that waits for a disk."""
        self.measures.clock.enter(phase)
        limit_s = self.config.mesh.save_timeout_s + WATCHDOG_MARGIN_S if slow else None
        self.watchdog.enter(phase, self.progress.step, limit_s)
        self.phases.enter(phase)

    # State

    def state(self) -> dict[str, Any]:
        """Tensors of the run by global names."""
        return {**self.engine.state(), "counters": self.measures.counters()}

    def own_state(self) -> dict[str, Tensor]:
        """Tensors of this rank alone."""
        own = {"rng_cpu": torch.get_rng_state()}
        if self.mesh.device.type == "cuda":
            own["rng_cuda"] = torch.cuda.get_rng_state(self.mesh.device)
        return own

    def restore_own(self, own: Mapping[str, Tensor]) -> None:
        """Takes over what `own_state` gave."""
        torch.set_rng_state(own["rng_cpu"])
        if "rng_cuda" in own:
            torch.cuda.set_rng_state(own["rng_cuda"], self.mesh.device)

    def load(self, path: Any) -> Mapping[str, Any]:
        """Takes over a checkpoint's state, whatever layout wrote it; returns its meta."""
        own = self.own_state()
        self.enter("load", slow=True)
        state = self.state()
        meta = self.store.load(path, state, own)
        self.engine.restore(state, meta["step"])
        self.restore_own(own)
        self.progress.step, self.progress.tokens = meta["step"], meta["tokens"]
        self.progress.next_sample = meta["next_sample"]
        return meta

    def save(self, log: RunLog, must: bool = False) -> None:
        """Writes a checkpoint, or begins to (``checkpoint.background``). What a failure does is the user's choice
        (``checkpoint.on_failure``), unless the run ``must`` not leave without one."""
        self.finish_save(log)
        if must and self.saved_step == self.progress.step:
            return
        self.measures.share_counters()
        meta = {**self.meta, **dataclasses.asdict(self.progress)}
        self.enter("save", slow=True)
        arguments = self.progress.step, self.state(), meta, self.own_state()
        if self.config.checkpoint.background and not must:
            self.saving = self.store.begin(*arguments)
            return
        with self.save_failures(log, must):
            path = self.store.save(*arguments, written=lambda: self.enter("commit", slow=True))
            self.tell_saved(log, path, self.progress.step)

    def finish_save(self, log: RunLog) -> None:
        """Waits for the save in the background, if there is one."""
        saving, self.saving, self.save_failed = self.saving, None, False
        if saving is None:
            return
        limit_s = self.config.mesh.save_timeout_s
        with self.save_failures(log):
            # Two phases, so that of ranks that wait for one another those are known which still write.
            self.enter("save", slow=True)
            saving.wait_written(limit_s)
            self.enter("commit", slow=True)
            self.tell_saved(log, saving.wait(limit_s), saving.step)

    def tell_saved(self, log: RunLog, path: Path, step: int) -> None:
        """Notes a checkpoint that is complete."""
        self.saved_step = step
        log.saved(step, path)

    @contextlib.contextmanager
    def save_failures(self, log: RunLog, must: bool = False) -> Iterator[None]:
        """What is done about a checkpoint that cannot be written."""
        try:
            yield
        except DiskError as error:
            if must or self.config.checkpoint.on_failure == "abort":
                raise
            log.say(f"Warning: {error} The run goes on (checkpoint.on_failure = warn).")

    # The loop

    def run(self, log: RunLog) -> bool:
        """Trains from where it stands. Returns whether all steps were done; False after a request to stop, saved."""
        try:
            done = self.run_steps(log)
            self.finish_save(log)
            return done
        except Exception as error:
            if isinstance(error, NonFiniteError):
                log.alert(Alert("nan", "a number is none", f"{error}."))
            self.outlast_save(error)
            raise

    def outlast_save(self, error: Exception) -> None:
        """Before this rank leaves with an error: lets the save in the background become the newest checkpoint."""
        if self.saving is None:
            return
        # All ranks leave together where a number was none; any other error may be that of one rank, which none outlives
        limit_s = self.config.mesh.save_timeout_s if isinstance(error, NonFiniteError) else LAST_SAVE_S
        self.enter("save", slow=True)
        try:
            self.saving.wait(limit_s)
        except Exception as failure:
            print(f"the checkpoint of step {self.saving.step} is lost: {failure}", file=sys.stderr)

    def run_steps(self, log: RunLog) -> bool:
        """The steps; see `run`."""
        train, progress = self.config.train, self.progress
        loader = self.loader()
        self.enter("measure")
        self.measures.measure_peak()
        self.model.train()
        while progress.step < train.steps:
            if self.config.log.phases.wants(progress.step + 1):
                self.phases.begin()
            if not self.step(loader):
                self.save(log, must=True)
                return False
            self.write_trace(log)
            if self.save_failed or (self.saving is not None and self.saving.saved):
                self.finish_save(log)
            if self.waiting_since is not None:
                log.say(f"first step done {time.time() - self.waiting_since:.1f} s after the start")
                self.waiting_since = None
            evaluates = due(train.eval_every, progress.step, train.steps)
            if evaluates:
                self.eval_loss = evaluate(
                    self.model, self.source, self.config, self.mesh, progress.step, beat=lambda: self.enter("eval")
                )
            if self.recorded(progress.step):
                self.record(log, evaluates)
            if due(train.checkpoint_every, progress.step, train.steps):
                self.save(log)
            if self.phases.on:
                self.write_phases(log)
        return True

    def write_phases(self, log: RunLog) -> None:
        """Writes what every rank did in the step, and says whom the others waited for; a failure costs the trace, not
        the run."""
        ranks, step = self.phases.end(), self.progress.step
        if self.mesh.dp.rank != 0 or self.traces is None:
            return
        straggler = find_straggler(ranks, self.mesh.ep.size)
        try:
            path = write_phases(self.traces, chrome_trace(ranks, step, straggler), step)
        except OSError as error:
            log.say(f"Warning: the phases of step {step} are not recorded: {error}. The run goes on.")
            return
        log.say(f"phases {path}: {straggler or 'no rank waited'}")

    def write_trace(self, log: RunLog) -> None:
        """Writes this rank's part of the routing that the step has recorded; a failure costs the trace, not the run."""
        rank, world = self.mesh.dp.rank, self.mesh.dp.size
        try:
            part = self.recorder.take(self.progress.step)
            if part is None or self.traces is None:
                return
            self.enter("trace", slow=True)
            write_part(self.traces, part, rank, world)
        except (OSError, TraceError) as error:
            line = f"Warning: the routing of step {self.progress.step} is not recorded: {error}. The run goes on."
            log.say(line)
            if rank != 0:  # has no sinks
                print(line, file=sys.stderr)

    def loader(self) -> Loader:
        """This rank's training data from where the run stands."""
        train = self.config.train
        return Loader(
            self.source,
            "train",
            sequence_length=train.sequence_length,
            micro_batch=train.micro_batch,
            seed=self.config.seed,
            rank=self.mesh.dp.rank,
            world_size=self.mesh.dp.size,
            accumulation=train.accumulation(self.mesh.dp.size),
            cross_documents=self.config.data.cross_documents,
            start_sample=self.progress.next_sample,
            pin_memory=self.mesh.device.type == "cuda",
        )

    def step(self, loader: Loader) -> bool:
        """One optimizer step, measured; False, with nothing done, where a rank was asked to stop.

        Raises:
            NonFiniteError: on all ranks; the model is unchanged.
        """
        with self.measures.step(self.recorded(self.progress.step + 1)), self.phases.listening():
            return self.take_step(loader)

    def recorded(self, step: int) -> bool:
        """Whether the numbers of ``step`` go to the sinks."""
        train = self.config.train
        return any(due(every, step, train.steps) for every in (train.log_every, train.eval_every))

    def take_step(self, loader: Loader) -> bool:
        """See `step`."""
        config, progress, device = self.config, self.progress, self.mesh.device
        self.enter("data")
        micro_batches = [batch.to(device) for batch in next(loader)]
        self.enter("agree")
        totals = self.agree(micro_batches)
        self.save_failed = totals.save_failed
        if totals.stop:
            return False
        self.engine.set_learning_rate(config.train.schedule.factor(progress.step + 1, config.train.steps))
        own = self.own_state() if self.may_spill else {}
        spill = self.try_step(micro_batches, totals, Spill(allowed=self.may_spill))
        if not math.isfinite(self.grad_norm) and spill.happened(self.mesh.dp):
            self.restore_own(own)
            self.recorder.forget()
            self.measures.spilled_steps += 1
            self.try_step(micro_batches, totals, Spill(allowed=False))
        if not math.isfinite(self.grad_norm):
            raise NonFiniteError(
                f"the gradient's norm at step {progress.step + 1} is {self.grad_norm}; the model is that of step "
                f"{progress.step}"
            )
        progress.step += 1
        progress.tokens += totals.num_tokens
        progress.next_sample = loader.next_sample
        self.measures.saw(progress.step, totals.num_tokens)
        self.move_biases()
        return True

    def try_step(self, micro_batches: list[TokenBatch], totals: Totals, spill: Spill) -> Spill:
        """Forward, backward, update; sets ``grad_norm``. Where it is not finite nothing has moved.

        Args:
            spill: whether rows may be left behind, and then what was.
        """
        config, device = self.config, self.mesh.device
        context = StepContext(
            seed=config.seed,
            step=torch.tensor(self.progress.step, device=device),
            num_tokens=torch.tensor(totals.num_tokens, device=device),
            training=True,
            may_spill=spill.allowed,
        )
        self.measures.clear()
        counts = self.count_first(micro_batches, context, spill)
        for place, batch in enumerate(micro_batches, start=1):
            self.enter("forward")
            with autocast(config, self.mesh):
                with self.recorder.listening(config.log.trace.wants(self.progress.step + 1)):
                    output = self.model(batch, dataclasses.replace(context, counts=counts))
                # This rank's share of the one global loss: gradients then add up over ranks, without a divisor.
                task_loss = token_loss(output, batch.target_BS) / max(totals.num_targets, 1)
                reports = self.measures.pack(output)
                loss = task_loss + sum(packed.objective() for packed in reports if packed is not None)
            spill.add(output)
            counts = counts.after((*output.reports, *output.attention_reports))
            del output  # the logits: gone with the backward pass, not with the next forward
            self.enter("backward")
            self.engine.backward(spill.spoil(loss), last=place == len(micro_batches))
            self.measures.add(task_loss, reports)
        self.enter("optimizer")
        self.grad_norm = self.engine.step(self.measures.gradients_summed)
        return spill

    def count_first(self, micro_batches: list[TokenBatch], context: StepContext, spill: Spill) -> StepCounts:
        """What balance losses count in the whole step, by a pass without gradient, where one of them asks for it."""
        counts = StepCounts()
        if len(micro_batches) == 1 or not any(layer.needs_whole_step for layer in self.measures.routed_layers):
            return counts
        for batch in micro_batches:
            self.enter("count")
            with torch.no_grad(), autocast(self.config, self.mesh):
                output = self.model(batch, context)
                spill.add(output)
                counts = counts.after((*output.reports, *output.attention_reports))
        return StepCounts(whole=counts.earlier)

    def move_biases(self) -> None:
        """Lets every layer that balances by a bias move it, once per step, by the counts of the whole global batch."""
        for layers, tally in self.measures.families:
            if any(layer.bias_rules for layer in layers):
                load_LE, observed = tally.global_load(self.mesh.dp), tally.global_observed(self.mesh.dp)
                for layer, load_E, seen in zip(layers, load_LE, observed, strict=True):
                    layer.move_bias(load_E, seen)

    def agree(self, micro_batches: list[TokenBatch]) -> Totals:
        """Sizes of the global batch, and whether any rank was asked to stop or failed to save."""
        num_targets = torch.stack([batch.num_targets() for batch in micro_batches]).sum()
        num_tokens = torch.stack([batch.num_tokens() for batch in micro_batches]).sum()
        flags = [self.stop.requested, self.saving is not None and self.saving.failed]
        flag_F = torch.tensor(flags, dtype=torch.int64, device=self.mesh.device)
        totals = all_sum(torch.cat([torch.stack([num_targets, num_tokens]), flag_F]), self.mesh.dp)
        targets, tokens, stops, failures = totals.tolist()
        return Totals(targets, tokens, stops > 0, failures > 0)

    def record(self, log: RunLog, evaluated: bool) -> None:
        """Sends the numbers of the step just done to the sinks; all ranks take part."""
        self.enter("metrics")
        record = self.measures.record(
            self.progress.step, self.progress.tokens, self.engine.learning_rates(), self.grad_norm
        )
        if evaluated:
            record["eval/loss"] = self.eval_loss
        self.last_record = record
        log.write(record)


def due(every: int | None, step: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the ``last`` one, happens at ``step``."""
    return every is not None and (step == last or step % every == 0)
