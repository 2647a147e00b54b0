"""A user's DeepSpeed JSON against the run, before any rank starts."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from moedist.config import ConfigError, ConfigErrors
from moedist.engine.contract import TrainingStep
from moedist.engine.deepspeed import DeepSpeedConfig
from moedist.engine.deepspeed_json import REFUSED, Merged, merge
from moedist.launch.compose import compose
from moedist.launch.validate import validate
from moedist.mesh import MeshConfig

STEP = TrainingStep(micro_batch=2, accumulation=3, precision="bf16", clip_norm=0.5, num_steps=100, warmup_steps=7)


def merged(config: dict[str, Any], zero_stage: int | None = None, **step: Any) -> Merged:
    return merge(config, zero_stage, dataclasses.replace(STEP, **step), world_size=4)


def errors_of(config: dict[str, Any], zero_stage: int | None = None, **step: Any) -> dict[str, str]:
    with pytest.raises(ConfigErrors) as caught:
        merged(config, zero_stage, **step)
    return {error.key: str(error) for error in caught.value.errors}


def test_without_a_json_the_run_says_all():
    result = merged({})
    assert result.settings == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 0.5,
        "gradient_allreduce_op": "sum",
    }
    assert result.notes == () and not result.has_optimizer and not result.has_scheduler


def test_what_came_out_can_go_in_again():
    first = merged({"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "zero_optimization": {"stage": 2}})
    assert merged(first.settings).settings == first.settings


def test_auto_is_filled_in_and_said():
    result = merged(
        {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto", "loss_scale": 0},
            "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True},
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": dict.fromkeys(("total_num_steps", "warmup_num_steps", "warmup_min_lr"), "auto"),
            },
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.1}},
            "steps_per_print": 10,
        }
    )
    assert result.settings["train_batch_size"] == 24 and result.settings["gradient_clipping"] == 0.5
    assert result.settings["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    params = {"total_num_steps": 100, "warmup_num_steps": 7, "warmup_min_lr": 0.0}
    assert result.settings["scheduler"] == {"type": "WarmupDecayLR", "params": params}
    assert result.settings["steps_per_print"] == 10
    assert "bf16" not in result.settings and "fp16" not in result.settings
    said = "\n".join(result.notes)
    for words in ("train_batch_size: 24", "reduce_bucket_size: DeepSpeed's default", "train.optimizer is not used"):
        assert words in said
    for words in ("train.schedule is not used", "warmup_num_steps: 7", "optimizer.params.lr: that of train.optimizer"):
        assert words in said


def test_every_contradiction_is_named_with_both_keys():
    errors = errors_of(
        {
            "train_batch_size": 32,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": False},
            "zero_optimization": {"stage": 1},
        },
        zero_stage=2,
    )
    expected = {
        "train_batch_size": "train.global_batch_tokens",
        "train_micro_batch_size_per_gpu": "train.micro_batch = 2",
        "gradient_accumulation_steps": "train.global_batch_tokens",
        "gradient_clipping": "train.clip_norm = 0.5",
        "bf16.enabled": "train.precision = bf16",
        "zero_optimization.stage": "engine.zero_stage = 2",
    }
    assert set(errors) == {f"engine.config.{key}" for key in expected}
    for key, other in expected.items():
        assert "contradicts" in errors[f"engine.config.{key}"] and other in errors[f"engine.config.{key}"]
    assert "engine.config.bf16.enabled" in errors_of({"bf16": {"enabled": True}}, precision="fp32")
    assert "engine.config.gradient_clipping" in errors_of({"gradient_clipping": 1.0}, clip_norm=None)


def test_what_the_run_says_too_is_no_contradiction():
    said = {
        "train_batch_size": 24,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": 2,
    }
    assert any("keeps routers in fp32" in note for note in merged(said).notes)


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_what_is_refused_says_what_to_use_instead(key: str):
    (message,) = errors_of({key: {"enabled": True}}).values()
    assert message.startswith(f"engine.config.{key} = ") and message.endswith(".")
    assert merged({key: {"enabled": False}}).settings == merged({}).settings


def test_misspelt_and_unknown_keys():
    errors = errors_of({"gradient_cliping": 1.0, "zero_optimization": {"overlap_com": True, "zenflow": {}}})
    assert "Did you mean gradient_clipping?" in errors["engine.config.gradient_cliping"]
    assert "Did you mean overlap_comm?" in errors["engine.config.zero_optimization.overlap_com"]
    assert "engine.config.zero_optimization.zenflow" in errors


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage"),
        ({"zero_optimization": 2}, "zero_optimization"),
        ({"zero_optimization": {"reduce_scatter": False}}, "zero_optimization.reduce_scatter"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype"),
        ({"communication_data_type": "fp16"}, "communication_data_type"),
        ({"optimizer": {"params": {}}}, "optimizer"),
        ({"optimizer": {"type": "OneBitAdam"}}, "optimizer.type"),
        ({"scheduler": {"type": "ReduceLROnPlateau"}}, "scheduler.type"),
        ({"scheduler": {"type": "OneCycle", "params": {"cycle_max_lr": "auto"}}}, "scheduler.params.cycle_max_lr"),
    ],
)
def test_what_cannot_be(config: dict[str, Any], key: str):
    assert set(errors_of(config)) == {f"engine.config.{key}"}


def test_divisors_are_switched_off():
    said = {"gradient_allreduce_op": "mean", "prescale_gradients": True, "gradient_predivide_factor": 4.0}
    result = merged(said)
    assert result.settings == merged({}).settings and len(result.notes) == 3


def test_zero_0_is_clipped_by_us():
    result = merged({"gradient_clipping": "auto"}, zero_stage=0)
    assert result.settings["gradient_clipping"] == 0.0 and "averages the ranks' norms" in result.notes[-1]


def check(config: DeepSpeedConfig, mesh: MeshConfig | None = None, **step: Any) -> None:
    config.check(dataclasses.replace(STEP, **step), mesh or MeshConfig(), 4)


def test_what_the_engine_cannot_do_is_said_in_the_parent(monkeypatch: pytest.MonkeyPatch):
    check(DeepSpeedConfig())
    with pytest.raises(ConfigError, match=r"zero_stage = 3 .* engine=native with mesh.fsdp"):
        DeepSpeedConfig(zero_stage=3)
    with pytest.raises(ConfigError, match=r"train.precision = 'fp64'"):
        check(DeepSpeedConfig(), precision="fp64")
    with pytest.raises(ConfigError, match=r"mesh.fsdp = 2 .* engine.zero_stage"):
        check(DeepSpeedConfig(), MeshConfig(fsdp=2))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    with pytest.raises(ConfigError, match=r"pip install 'moedist\[deepspeed\]'"):
        check(DeepSpeedConfig())


def test_a_contradiction_is_named_before_a_rank_starts():
    overrides = ["engine=deepspeed", "engine.config={train_batch_size: 7}", "mesh.fsdp=4", "data=synthetic"]
    composed = compose(["experiment=null", "data.num_tokens=50000", *overrides])
    with pytest.raises(ConfigErrors) as caught:
        validate(composed.config, composed.mapping, 4)
    assert [error.key for error in caught.value.errors] == ["mesh.fsdp"]
    composed = compose(["experiment=null", "data.num_tokens=50000", *overrides, "mesh.fsdp=null"])
    with pytest.raises(ConfigErrors, match=r"engine.config.train_batch_size = 7 contradicts .*train.micro_batch"):
        validate(composed.config, composed.mapping, 4)


def test_a_json_is_read_from_a_file(tmp_path: Path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert DeepSpeedConfig(config=str(path)).merged(STEP, 4).stage == 2
    for text, words in (("{", "is no JSON"), ("[1]", "holds no mapping")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            check(DeepSpeedConfig(config=str(path)))
    with pytest.raises(ConfigError, match=r"engine.config = .* cannot be read"):
        check(DeepSpeedConfig(config=str(tmp_path / "gone.json")))
