"""The presets of ``conf/moe``: their keys are those of the projects they are named after, and each composes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import moedist
from moedist.config import ConfigError
from moedist.launch.compose import compose, conf_folder
from moedist.moe.layer import MoEConfig

# preset -> every key that the projects differ in. What is not named stays at the default.
TABLE: dict[str, dict[str, object]] = {
    "default": {},
    "switch": {
        "router.top_k": 1,
        "router.renormalize": False,
        "router.selection_bias": "refused",
        "router.input_jitter": 1e-2,
        "capacity.factor": 1.25,
        "capacity.base": "tokens",
        "capacity.drop_policy": "token",
        "capacity.renormalize_after_drop": False,
        "balance": {"switch": 0.01},
    },
    "gshard": {
        "router.top_k": 2,
        "router.renormalize": True,
        "router.selection_bias": "refused",
        "capacity.factor": 2.0,
        "capacity.base": "tokens",
        "capacity.drop_policy": "choice",
        "capacity.renormalize_after_drop": False,
        "balance": {"switch": 0.01},
        "balance.switch.count": "first",
    },
    "deepspeed_top1": {
        "router.top_k": 1,
        "router.renormalize": False,
        "router.selection_bias": "refused",
        "capacity.factor": 1.0,
        "capacity.rounding": "ceil_float32",
        "capacity.min_capacity": 4,
        "capacity.drop_policy": "random",
        "capacity.renormalize_after_drop": False,
        "balance": {"switch": 0.01},
        "balance.switch.scope": "micro_batch",
    },
    "deepspeed_top2": {
        "router.top_k": 2,
        "router.renormalize": False,
        "router.selection_bias": "refused",
        "capacity.factor": 1.0,
        "capacity.rounding": "ceil_float32",
        "capacity.min_capacity": 4,
        "capacity.drop_policy": "choice",
        "capacity.renormalize_after_drop": "one",
        "balance": {"switch": 0.01},
        "balance.switch.scope": "micro_batch",
        "balance.switch.count": "first",
    },
    "deepspeed_topk": {
        "router.top_k": 2,
        "router.renormalize": False,
        "router.selection_bias": "refused",
        "capacity.factor": 1.0,
        "capacity.rounding": "ceil_float32",
        "capacity.min_capacity": 4,
        "capacity.drop_policy": "probability",
        "capacity.renormalize_after_drop": "one",
        "balance": {"switch": 0.01},
        "balance.switch.scope": "micro_batch",
    },
    "megatron": {
        "router.top_k": 2,
        "router.renormalize": True,
        "router.selection_bias": "refused",
        "capacity.factor": 1.0,
        "capacity.drop_policy": "gate",
        "capacity.renormalize_after_drop": False,
        "balance": {"switch": 0.01},
        "balance.switch.scope": "micro_batch",
    },
    "mixtral": {
        "num_experts": 8,
        "router.top_k": 2,
        "router.renormalize": True,
        "router.selection_bias": "refused",
        "capacity.factor": None,
        "balance": {"switch": 0.02},
    },
    "olmoe": {
        "num_experts": 64,
        "router.top_k": 8,
        "router.renormalize": False,
        "router.selection_bias": "refused",
        "capacity.factor": None,
        "balance": {"switch": 0.01, "z_loss": 0.001},
    },
    "qwen3_moe": {
        "num_experts": 128,
        "router.top_k": 8,
        "router.renormalize": True,
        "router.selection_bias": "refused",
        "capacity.factor": None,
        "balance": {"switch": 0.001},
    },
    "deepseek_v3": {
        "num_experts": 256,
        "shared_hidden_dim": 2048,
        "router.top_k": 8,
        "router.score": "sigmoid",
        "router.renormalize": True,
        "router.scale": 2.5,
        "router.groups.num_groups": 8,
        "router.groups.top_groups": 4,
        "capacity.factor": None,
        "balance": {"bias": None, "switch": 1e-4},
        "balance.bias.rate": 1e-3,
        "balance.switch.scope": "sequence",
    },
    "st_moe": {
        "router.top_k": 2,
        "router.renormalize": True,
        "router.selection_bias": "refused",
        "capacity.factor": 1.25,
        "capacity.eval_factor": 2.0,
        "capacity.base": "tokens",
        "capacity.rounding": "floor",
        "capacity.drop_policy": "choice",
        "capacity.renormalize_after_drop": False,
        "balance": {"switch": 0.01, "z_loss": 0.001},
    },
    "expert_choice": {
        "router.kind": "expert_choice",
        "capacity.factor": None,
        "balance": {},
    },
}  # fmt: skip
KEYS = sorted({key for row in TABLE.values() for key in row} - {"balance"})
DEFAULT = MoEConfig()


def value_of(config: object, key: str) -> object:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else getattr(config, part, None)
        if config is None:
            return None
    return config


def test_every_preset_is_in_the_table():
    assert {path.stem for path in (conf_folder() / "moe").glob("*.yaml")} == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_keys_are_those_of_the_table(name: str):
    """A key that the table leaves out has its default (or none, where another choice has no such key)."""
    moe = compose(["experiment=null", f"moe={name}"]).config.moe
    row = TABLE[name]
    for key in KEYS:
        value = value_of(moe, key)
        if key in row:
            assert value == row[key] and type(value) is type(row[key]), key
        elif value is not None:
            assert value == value_of(DEFAULT, key), key
    coefficients = {kind: getattr(loss, "coefficient", None) for kind, loss in moe.balance.items()}
    assert coefficients == row.get("balance", {"switch": 0.01, "z_loss": 0.001})


def test_no_code_knows_a_preset():
    """What a preset does is said by its keys: no text in the sources names one, docstrings aside."""
    names = set(TABLE) - {"default", "switch", "expert_choice"}  # names of choices and values too
    root = Path(moedist.__file__).parent
    for path in (path for room in ("moe", "model", "train", "launch") for path in (root / room).rglob("*.py")):
        tree = ast.parse(path.read_text())
        documented = [node for node in ast.walk(tree) if isinstance(node, ast.Expr)]
        texts = {node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        texts -= {node.value for node in documented if isinstance(node.value, ast.Constant)}
        found = {text.value for text in texts if any(name in text.value for name in names)}
        assert not found, f"{path} knows {found}"


@pytest.mark.parametrize("name", sorted(set(TABLE) - {"expert_choice"}))
def test_each_builds_a_decoder(name: str):
    config = compose(["experiment=null", f"moe={name}"]).config
    model = config.model.build(64, config.moe, device="meta")
    assert len(model.moe_blocks) > 0


def test_expert_choice_is_refused_in_the_parent_with_the_reason(tmp_path: Path):
    from moedist.launch.validate import validate

    composed = compose(["experiment=null", "data=synthetic", "moe=expert_choice", f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError) as caught:
        validate(composed.config, composed.mapping, 1)
    errors = {error.key: str(error) for error in getattr(caught.value, "errors", [caught.value])}
    assert "the model is causal" in errors["moe.router.kind"] and "moe/router=topk" in errors["moe.router.kind"]
    assert "'expert_choice'" in errors["moe.router.kind"]


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["moe.router.groups={num_groups: 3, top_groups: 1}"], "moe.router.groups.num_groups", "does not divide the 8"),
        (["moe.router.groups={num_groups: 4, top_groups: 9}"], "moe.router.groups.top_groups", "Set it to 1 to 4"),
        (["moe/router=hash", "moe/balance=[bias]"], "moe.balance.bias.kind", "Choose a token-choice router"),
        (["moe/balance=[load]"], "moe.balance.load.kind", "Set moe/router=noisy"),
        (["moe/router=expert_choice"], "moe.capacity.factor", "Set moe.capacity.factor to null"),
        (["moe/router=sinkhorn", "moe.router.iterations=0"], "moe.router.iterations", "Set it to 1 or more"),
        (["moe.capacity.rounding=up"], "moe.capacity.rounding", "ceil"),
        (["moe.capacity.overflow=wrap"], "moe.capacity.overflow", "next_best"),
        (["moe/router=forced", "moe.router.pattern=zip"], "moe.router.pattern", "zipf"),
    ],
)
def test_what_cannot_be_composed(overrides: list[str], key: str, words: str):
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=null", *overrides])
    errors = {error.key: str(error) for error in getattr(caught.value, "errors", [caught.value])}
    assert words in errors[key]


def test_presets_and_single_keys_go_together():
    moe = compose(
        ["experiment=null", "moe=deepspeed_top2", "moe.capacity.factor=1.5", "moe/dispatch=padded"]
    ).config.moe
    assert (moe.capacity.factor, moe.capacity.drop_policy, moe.dispatch.kind) == (1.5, "choice", "padded")
    grouped = compose(["experiment=null", "moe.router.groups={num_groups: 4, top_groups: 2}"]).config.moe
    assert (grouped.router.groups.num_groups, grouped.router.groups.score) == (4, "top2_sum")


@pytest.mark.parametrize("rule", ["bias", pytest.param("quantile", marks=pytest.mark.slow)])
def test_a_bias_is_refused_by_presets_of_softmax_routers(rule: str):
    """Their experts are those of the highest probability; who wants another selection says so."""
    for name, row in TABLE.items():
        methods = dict.fromkeys([*row.get("balance", {}), rule])
        overrides = ["experiment=null", f"moe={name}", f"moe/balance=[{','.join(methods)}]"]
        if row.get("router.selection_bias") == "refused":
            with pytest.raises(ConfigError, match="highest softmax scores.*set moe.router.selection_bias to") as caught:
                compose(overrides)
            assert (caught.value.key, caught.value.value) == (f"moe.balance.{rule}.kind", rule)
            compose([*overrides, "moe.router.selection_bias=allowed"])
        elif name == "expert_choice":
            with pytest.raises(ConfigError, match="has no selection"):
                compose(overrides)
        elif rule == "quantile" and "bias" in methods:
            with pytest.raises(ConfigError, match="Leave one out: ~moe.balance.quantile or ~moe.balance.bias"):
                compose(overrides)
            assert "bias" not in compose([*overrides, "~moe.balance.bias"]).config.moe.balance
        else:
            compose(overrides)
