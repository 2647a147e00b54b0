"""DeepSpeed's engine around our model: ZeRO 0, 1 and 2, its optimizers and schedulers. The only file that imports it.

DeepSpeed reduces experts over the right ranks when four things hold, all made here and nowhere else: its tables of
groups hold the mesh's own; every expert parameter says ``allreduce = False`` and the name of its group; the
optimizer's groups are split into experts and the rest; and the module it is given holds an instance of its `MoE`, which
it looks for by ``isinstance``. Two of its habits are switched off: it divides gradients by the number of ranks and
losses by the number of micro-steps, where our losses are shares whose gradients are sums.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import get_process_group_ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from moedist.config import ConfigError, require
from moedist.engine.contract import EngineConfig, GradientOf, TrainingStep
from moedist.engine.deepspeed_json import AUTO, KEY, Merged, merge
from moedist.mesh import Mesh, MeshConfig
from moedist.model.attention.mixture import AttentionMixture
from moedist.moe.modules import ModuleExperts
from moedist.parallel.gradients import GradientTable
from moedist.parallel.guest import experts_to_spread
from moedist.parallel.spread import spread

INSTALL = "pip install 'moedist[deepspeed]'"


@dataclasses.dataclass(frozen=True)
class DeepSpeedConfig(EngineConfig):
    """DeepSpeed.

    Attributes:
        zero_stage: 0: all whole on every rank; 1: optimizer state cut over the ranks; 2: gradients too. None: what
            ``config`` says, and 1 where it says nothing.
        config: a DeepSpeed JSON, as a path or written out; ``"auto"`` takes the run's value. None for none.
    """

    zero_stage: int | None = None
    config: dict[str, Any] | str | None = None

    def __post_init__(self) -> None:
        require(
            self.zero_stage in (None, 0, 1, 2),
            "zero_stage",
            self.zero_stage,
            "is no stage of this engine: DeepSpeed's own expert parallelism has none above 2",
            "Set it to 2, or use engine=native with mesh.fsdp, which shards the parameters too.",
        )

    @property
    def alike(self) -> str:
        """It knows experts as stacked weights, cut along their first dim."""
        return "DeepSpeed sums the gradients of all other weights over all ranks"

    @property
    def cuts_anywhere(self) -> str:
        """ZeRO cuts the flat row of all parameters."""
        return "DeepSpeed's ZeRO cuts the flat row of all parameters anywhere"

    def check(self, step: TrainingStep, mesh: MeshConfig, world_size: int) -> None:
        """See the contract."""
        require(
            importlib.util.find_spec("deepspeed") is not None,
            "engine.kind",
            self.kind,
            "needs DeepSpeed, which is not installed",
            f"Install it ({INSTALL}), or set engine=native.",
        )
        require(
            step.precision != "fp64",
            "train.precision",
            step.precision,
            "is none of DeepSpeed's: it sums gradients and keeps weights in fp32",
            "Set it to fp32 or bf16, or engine=native.",
        )
        require(
            mesh.fsdp is None,
            "mesh.fsdp",
            mesh.fsdp,
            "is the native engine's way to cut weights over ranks; DeepSpeed cuts by its ZeRO stage",
            "Set it to null and engine.zero_stage to 1 or 2, or set engine=native.",
        )
        self.merged(step, world_size)

    def one_order(self, step: TrainingStep, world_size: int) -> str | None:
        """At ZeRO 2, or where sums overlap backward, ranks fill the buckets that they sum as gradients arrive."""
        merged = self.merged(step, world_size)
        at_once = merged.stage > 1 or merged.settings["zero_optimization"].get("overlap_comm") is True
        if world_size == 1 or not at_once:
            return None
        return f"DeepSpeed at ZeRO {merged.stage} sums gradients over ranks in the order in which they arrive on each"

    def merged(self, step: TrainingStep, world_size: int) -> Merged:
        """The JSON and the run as one.

        Raises:
            ConfigError: it cannot be read.
            ConfigErrors: it contradicts the run.
        """
        config = read_json(self.config) if isinstance(self.config, str) else self.config or {}
        return merge(config, self.zero_stage, step, world_size)

    def build(
        self,
        model: nn.Module,
        mesh: Mesh,
        optimizer: torch.optim.Optimizer,
        gradients: GradientTable,
        step: TrainingStep,
    ) -> DeepSpeedEngine:
        """Takes charge; experts that lie as DTensors become plain parameters of this rank.

        Raises:
            ConfigError: the ranks are not there (a dry run), and DeepSpeed builds nothing without them.
        """
        require(
            mesh.device.type != "meta",
            "engine.kind",
            self.kind,
            "cannot be built without its ranks",
            "Plan with engine=native: weights and experts lie alike, and ZeRO cuts their state.",
        )
        return DeepSpeedEngine(self.merged(step, mesh.dp.size), model, mesh, optimizer, gradients, step.clip_norm)


def read_json(path: str) -> dict[str, Any]:
    """A JSON file with a mapping in it.

    Raises:
        ConfigError: there is none.
    """
    remedy = "Name a JSON file of DeepSpeed's, or write its keys below engine.config."
    try:
        config = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(KEY, path, f"cannot be read ({error.strerror})", remedy) from error
    except ValueError as error:
        raise ConfigError(KEY, path, f"is no JSON ({error})", remedy) from error
    require(isinstance(config, dict), KEY, path, "holds no mapping", remedy)
    return config


class DeepSpeedEngine:
    """See `moedist.engine.contract.Engine`."""

    def __init__(
        self,
        merged: Merged,
        model: nn.Module,
        mesh: Mesh,
        optimizer: torch.optim.Optimizer,
        gradients: GradientTable,
        clip_norm: float | None,
    ):
        self.model, self.gradients, self.clip_norm = model, gradients, clip_norm
        deepspeed = import_deepspeed(mesh)
        self.layout = Layout.take_over(model, optimizer.param_groups, mesh, gradients)
        experts = [p for name, p in model.named_parameters() if name in self.layout.experts | self.layout.local]
        introduce(mesh, model, experts)
        groups = split_groups(optimizer, merged)
        self.merged = fill_in(merged, groups, mesh)
        if not merged.has_optimizer:
            optimizer.param_groups[:] = groups
        self.engine, *_ = deepspeed.initialize(
            model=carry(model, has_experts=bool(experts)),
            optimizer=None if merged.has_optimizer else optimizer,
            model_parameters=groups,
            config=copy.deepcopy(self.merged.settings),
        )
        self.basic: torch.optim.Optimizer = self.engine.basic_optimizer
        self.zero = self.engine.optimizer if merged.stage > 0 else None
        self.peak_rates = [group["lr"] for group in self.basic.param_groups]
        self._make_moments()
        self.rates = self._rates()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of this rank's share. ZeRO 2 sums over ranks here, the others at the last one."""
        self.engine.set_gradient_accumulation_boundary(last)
        # Divided by the micro-steps it must not be: neither here, nor by the hook on what forward returned, which lets
        # a gradient alone that came through another tensor.
        self.engine.backward(self.engine(loss).clone(), scale_wrt_gas=False)

    def step(self, summed: Callable[[GradientOf], None] = lambda gradient_of: None) -> float:
        """Norm, clip, update, clear: DeepSpeed's, but for the norm and the clip of ZeRO 0."""
        self.rates = self._rates()
        # Under round_robin_gradients DeepSpeed tells one parameter's gradient for another's: none is better.
        mixed_up = self.merged.settings.get("zero_optimization", {}).get("round_robin_gradients", False)
        summed((lambda parameter: None) if mixed_up else gradient_of)
        if self.zero is not None:
            self.engine.step()
            return float(self.engine.get_global_grad_norm())
        norm = self.gradients.norm(self.model).item()
        if not math.isfinite(norm):
            self.engine.zero_grad()
            return norm
        if self.clip_norm is not None and norm > self.clip_norm:
            self.gradients.scale(self.model, self.clip_norm / norm)
        self.engine.step()
        return norm

    def set_learning_rate(self, factor: float) -> None:
        """Sets every group to ``factor`` x its peak, unless a scheduler of DeepSpeed's sets them."""
        if not self.merged.has_scheduler:
            for group, peak in zip(self.basic.param_groups, self.peak_rates, strict=True):
                group["lr"] = factor * peak
        self.rates = self._rates()

    def learning_rates(self) -> dict[str, float]:
        """By role, of the latest step: DeepSpeed's scheduler sets the next step's at the end of one."""
        return dict(self.rates)

    def notes(self) -> Sequence[str]:
        """What was filled in, changed or left out of the user's JSON."""
        return (f"ZeRO {self.merged.stage}; the whole of its settings is in deepspeed.json", *self.merged.notes)

    def settings(self) -> Mapping[str, Any] | None:
        """What DeepSpeed got."""
        return self.merged.settings

    def close(self) -> None:
        """Its hooks, and its references to groups: a group that outlives the run aborts the process at exit."""
        from deepspeed.utils import groups

        self.engine.destroy()
        groups._release_process_group_references()

    # State

    def state(self) -> dict[str, Any]:
        """``model.<parameter>`` and ``optimizer.<parameter>.<moment>``, as the native engine's.

        ZeRO cuts the flat row of all parameters, anywhere. What it cut is gathered here, one moment after the other,
        and cut again along a dim, as a checkpoint can say it.
        """
        model = {name: self.layout.show(name, value) for name, value in self.model.state_dict().items()}
        moments: dict[str, dict[str, Tensor]] = {}
        for place in self._places():
            moments[place.name] = {key: torch.tensor(value) for key, value in place.scalars.items()}
            for key in place.keys:
                if self.zero is None:
                    moments[place.name][key] = self.layout.show(place.name, place.state[key])
                else:
                    moments[place.name][key] = self.layout.cut(place.name, gather(place.parameter, key))
        return {"model": model, "optimizer": moments}

    @torch.no_grad()
    def restore(self, state: dict[str, Any], num_steps: int) -> None:
        """Weights are live, and so are the moments of ZeRO 0; what ZeRO cut and what is no tensor is put back."""
        for place in self._places():
            filled = state["optimizer"][place.name]
            for key in place.scalars:
                held = place.state[key]
                if isinstance(held, Tensor):
                    held.copy_(filled[key])
                else:
                    place.state[key] = type(held)(filled[key])
            for key in place.keys if self.zero is not None else ():
                scatter(place.parameter, self.layout.whole(place.name, filled[key]), key)
        if self.zero is not None:
            self.zero.refresh_fp32_params()
        if self.merged.has_scheduler and num_steps > 0:
            self.engine.lr_scheduler.step(num_steps - 1)
        self.rates = self._rates()

    def _rates(self) -> dict[str, float]:
        return {group["role"]: float(group["lr"]) for group in self.basic.param_groups}

    def _places(self) -> Iterator[Place]:
        """Where the optimizer keeps the state of each parameter: under itself, or under its group's flat part."""
        name_of: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        for index, group in enumerate(self.basic.param_groups):
            flat = self.zero is not None
            parameters = self.zero.bit16_groups[index] if self.zero is not None else group["params"]
            states = [self.basic.state[group["params"][0 if flat else i]] for i in range(len(parameters))]
            keys = tuple(key for key, value in states[0].items() if key != "step" and isinstance(value, Tensor))
            # Of the steps that FusedAdam keeps per parameter, it counts the last one's alone.
            scalars = {key: max(float(s[key]) for s in states) for key in states[0] if key == "step"}
            for parameter, state in zip(parameters, states, strict=True):
                yield Place(name_of[parameter], parameter, state, keys, scalars)

    def _make_moments(self) -> None:
        """Optimizers make their state at the first step, and a load needs it before: a step with zero gradients at rate
        zero makes it and moves nothing. And ZeRO looks for a parameter's part in it only once."""
        kept = [(group, group["lr"], [p.grad for p in group["params"]]) for group in self.basic.param_groups]
        for group in self.basic.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.basic.step()
        for group, rate, grads in kept:
            group["lr"] = rate
            for parameter, grad in zip(group["params"], grads, strict=True):
                parameter.grad = grad  # offloading keeps a buffer there
                state = self.basic.state[parameter]
                for key, value in state.items():
                    state[key] = value.zero_() if isinstance(value, Tensor) else 0 if key == "step" else value
        if self.zero is not None:
            self.zero._lazy_init_hp_params_optimizer_state()


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the optimizer's state of one parameter is.

    Attributes:
        name: global.
        parameter: this rank's.
        state: that holds it; with ZeRO that of a whole group's flat part.
        keys: of its moments, of the parameter's shape or cut from it.
        scalars: its numbers.
    """

    name: str
    parameter: nn.Parameter
    state: dict[str, Any]
    keys: tuple[str, ...]
    scalars: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How tensors lie over the ranks, by the parameter's name: DeepSpeed wants plain ones, a checkpoint must know more.

    Attributes:
        grid: the ranks as [expert data parallel, expert parallel].
        line: the same as one line.
        experts: the parameters of which this rank holds a part, cut along dim 0 over ``ep``.
        local: further ones that this rank's experts alone have.
    """

    grid: DeviceMesh
    line: DeviceMesh
    experts: frozenset[str]
    local: frozenset[str]

    @classmethod
    def take_over(
        cls, model: nn.Module, groups: Sequence[dict[str, Any]], mesh: Mesh, gradients: GradientTable
    ) -> Layout:
        """Puts this rank's part, a plain parameter, in the place of each DTensor of the model and of an optimizer's
        groups."""
        assert mesh.device_mesh is not None, "DeepSpeed needs a process group, of one rank at least"
        assert mesh.fsdp is None, "DeepSpeed cuts by its ZeRO stage"
        edp = "edp" if "edp" in (mesh.device_mesh.mesh_dim_names or ()) else "replicate"
        plain: dict[nn.Parameter, nn.Parameter] = {}
        names = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
        for name in names:
            owner = model.get_submodule(name.rpartition(".")[0])
            parameter = model.get_parameter(name)
            assert isinstance(parameter, DTensor) and tuple(parameter.placements) == (Shard(0),), f"{name} is cut twice"
            part = nn.Parameter(parameter.to_local().detach(), requires_grad=parameter.requires_grad)
            setattr(owner, name.rpartition(".")[2], part)
            plain[parameter] = part
        for group in groups:
            group["params"] = [plain.get(parameter, parameter) for parameter in group["params"]]
        # Attention's experts lie on every rank, as dense weights do.
        experts = frozenset(name for name, spread in gradients.spread_of.items() if spread.pieces is not None)
        grid = mesh.device_mesh[edp, "ep"]
        return cls(grid, grid._flatten("dp"), frozenset(names), experts - frozenset(names))

    def show(self, name: str, value: Tensor) -> Tensor:
        """A live tensor as a checkpoint names it: of an expert's parameter the global one, in the same memory."""
        if name not in self.experts:
            return value
        return DTensor.from_local(value.detach(), self.grid, (Replicate(), Shard(0)), run_check=False)

    def cut(self, name: str, value: Tensor) -> Tensor:
        """This rank's share of a moment that every holder of the parameter has whole: a copy of 1 / holders of it.

        Each axis cuts a dim of its own: where two cut one dim unevenly, a checkpoint mistakes their offsets.
        """
        if name in self.local or value.dim() == 0:
            return value
        if name not in self.experts:
            whole = DTensor.from_local(value, self.line, (Replicate(),), run_check=False)
            return whole.redistribute(placements=(Shard(0),)).clone()
        shared = Shard(1) if value.dim() > 1 else Replicate()
        whole = DTensor.from_local(value, self.grid, (Replicate(), Shard(0)), run_check=False)
        return whole.redistribute(placements=(shared, Shard(0))).clone()

    def whole(self, name: str, value: Tensor) -> Tensor:
        """The inverse of `cut`."""
        if not isinstance(value, DTensor):
            return value
        held = (Replicate(), Shard(0)) if name in self.experts else (Replicate(),)
        return value.redistribute(placements=held).to_local()


def import_deepspeed(mesh: Mesh) -> Any:
    """The library, told of the mesh's device before it looks for one itself.

    On a CPU without its shared-memory collectives: it would compile them, for a minute, and a process that is killed in
    the middle leaves a lock on which later runs hang.
    """
    os.environ["DS_ACCELERATOR"] = mesh.device.type
    import deepspeed

    assert deepspeed.get_accelerator().device_name() == mesh.device.type, "DeepSpeed was imported for another device"
    if mesh.device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def introduce(mesh: Mesh, model: nn.Module, experts: Sequence[nn.Parameter]) -> None:
    """Tells DeepSpeed of the mesh's groups, which keep their time-outs, and of which parameters belong to which.

    Its own groups of `ep` neighbouring ranks, and of the ranks that hold the same experts, are those of the mesh.
    """
    from deepspeed.utils import groups

    name = f"ep_size_{mesh.ep.size}"
    groups._WORLD_GROUP = mesh.dp.group
    groups._EXPERT_PARALLEL_GROUP[name] = mesh.ep.group
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = get_process_group_ranks(mesh.ep.group)
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.edp.group
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = get_process_group_ranks(mesh.edp.group)
    for parameter in experts:
        parameter.allreduce, parameter.group_name = False, name  # type: ignore[attr-defined]
    for parameter in model.parameters():
        if parameter.dim() == 0:
            # It sends first values around as bytes, as which it cannot view these. All ranks start equal anyway.
            parameter.ds_optim_param = True  # type: ignore[attr-defined]


def marker() -> nn.Module:
    """What DeepSpeed looks for in a module's tree: by its class alone it sees that there are experts."""
    from deepspeed.moe.layer import MoE

    class Marker(MoE):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = 1

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """Nothing: `introduce` has told it of the groups."""

        @property
        def expert_group_name(self) -> str:
            """What DeepSpeed asks for when it saves, which would leave out experts that are not of its own class."""
            raise RuntimeError(
                "save_checkpoint of DeepSpeed knows its own experts only and would leave these out: save with "
                "torch.distributed.checkpoint what state_dict of spread_for_deepspeed's result gives"
            )

    return Marker()


def carry(model: nn.Module, has_experts: bool) -> nn.Module:
    """The module that DeepSpeed is given: it holds the model, and passes on the loss.

    The loop calls the model itself. What DeepSpeed hangs on the output of forward it so hangs on the loss.
    """

    class Carrier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.marker = marker() if has_experts else None

        def forward(self, loss: Tensor) -> Tensor:
            return loss

    return Carrier()


def split_groups(optimizer: torch.optim.Optimizer, merged: Merged) -> list[dict[str, Any]]:
    """The optimizer's groups, experts and others apart as DeepSpeed wants them, each with its ``role`` for people.

    For an optimizer of DeepSpeed's with those of the settings alone that its JSON leaves to the run (``"auto"``).

    Raises:
        ConfigError: the run's optimizer has no such setting.
    """
    groups = [{"role": group["name"], **group} for group in optimizer.param_groups]
    if merged.has_optimizer:
        left = [key for key, value in merged.settings["optimizer"]["params"].items() if value == AUTO]
        for key in left:
            require(
                all(key in group for group in groups),
                f"{KEY}.optimizer.params.{key}",
                AUTO,
                "is no setting of train.optimizer",
                "Give it a value.",
            )
        groups = [{key: group[key] for key in ("role", "name", "params", *left)} for group in groups]
    return split_experts(groups)


def split_experts(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An optimizer's groups with experts and others apart, as DeepSpeed wants them."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    split: list[dict[str, Any]] = split_params_into_different_moe_groups_for_optimizer(groups)
    return [group for group in split if group["params"]]


def fill_in(merged: Merged, groups: Sequence[Mapping[str, Any]], mesh: Mesh) -> Merged:
    """What is known only now: the groups, which have taken over what was ``"auto"``, and the device."""
    settings, notes = copy.deepcopy(merged.settings), list(merged.notes)
    settings.setdefault("timers", {"throughput": {"enabled": False}})  # which would wait for the device every step
    if not merged.has_optimizer:
        settings.setdefault("zero_allow_untested_optimizer", True)  # the run's own is the user's choice
    peaks = [group.get("lr") for group in groups]
    if merged.has_optimizer:
        params = {key: value for key, value in settings["optimizer"]["params"].items() if value != AUTO}
        peaks = [params.get("lr") if peak is None else peak for peak in peaks]
        adam = settings["optimizer"]["type"].lower() in ("adam", "adamw")
        offloads = "offload_optimizer" in settings["zero_optimization"]
        if mesh.device.type == "cpu" and adam and not offloads and "torch_adam" not in params:
            params["torch_adam"] = True
            notes.append("optimizer.params.torch_adam: true, filled in: the fused one must be compiled for minutes")
        settings["optimizer"]["params"] = params
    if merged.has_scheduler and settings["scheduler"]["params"].get("warmup_max_lr") == AUTO:
        settings["scheduler"]["params"]["warmup_max_lr"] = peaks
        notes.append(f"scheduler.params.warmup_max_lr: {peaks}, filled in: the peak of each group")
    return Merged(settings, tuple(notes))


def gradient_of(parameter: nn.Parameter) -> Tensor | None:
    """A parameter's summed gradient, whole, from the ranks over which ZeRO cut it: then a collective."""
    from deepspeed.utils import safe_get_full_grad

    gradient: Tensor | None = safe_get_full_grad(parameter)
    return gradient


def gather(parameter: nn.Parameter, key: str) -> Tensor:
    """A moment of a parameter, whole, from the ranks over which ZeRO cut it; a collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    value: Tensor = safe_get_full_optimizer_state(parameter, key)
    return value


def scatter(parameter: nn.Parameter, value: Tensor, key: str) -> None:
    """Puts this rank's part of a moment to where ZeRO keeps it."""
    from deepspeed.utils import safe_set_full_optimizer_state

    safe_set_full_optimizer_state(parameter, value, key)


@dataclasses.dataclass(frozen=True)
class Lent:
    """What a DeepSpeed script of somebody's own needs of a model whose experts are spread.

    Attributes:
        groups: parameter groups, experts and others apart, each with a ``name``; settings of an optimizer may be added.
        layout: how the experts lie.
    """

    groups: list[dict[str, Any]]
    layout: Layout

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights of ``model`` by global names, experts as DTensors in the same memory: what
        `torch.distributed.checkpoint` saves, and fills when it loads."""
        return {name: self.layout.show(name, value) for name, value in model.state_dict().items()}


def spread_for_deepspeed(model: nn.Module, mesh: Mesh) -> Lent:
    """For a script of somebody's own: shards the experts over ``mesh.ep``, in place, and tells DeepSpeed of them.

    For the layers of `moedist.moe.MoEConfig`. Experts that are modules, and those of attention, are called as tokens
    choose them, so their gradients arrive in another order on each rank, and ZeRO 2 would add up unlike ones.

    Call it before ``deepspeed.initialize``, which gets ``model`` and the groups, bare or in an optimizer. DeepSpeed
    then averages every gradient over all ranks, the experts' too: the loss of a step is the mean of the ranks' losses.

    Raises:
        ConfigError: a layer cannot be spread over this many ranks.
        ValueError: no MoE layer, one that is spread already, a model that is wrapped already, or one with experts that
            tokens choose one by one.
    """
    for name, module in model.named_modules():
        if isinstance(module, AttentionMixture | ModuleExperts):
            raise ValueError(
                f"{name} calls its experts as tokens choose them, so their gradients arrive in another order on each "
                "rank, and DeepSpeed's ZeRO 2 would add up unlike ones: train it with spread_as_guest and DDP or FSDP2"
            )
    import_deepspeed(mesh)
    experts_to_spread(model)
    layout = Layout.take_over(model, [], mesh, spread(model, mesh))
    introduce(mesh, model, [p for name, p in model.named_parameters() if name in layout.experts | layout.local])
    model.add_module("deepspeed_marker", marker())
    return Lent(split_experts([{"params": list(model.parameters()), "name": "all"}]), layout)
