"""A Hugging Face ``config.json`` as overrides of a run's configuration: the same shape of this project's parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moedist.config import ConfigError

KEY = "--hf"
"""Where the file stands on the command line."""

Values = Mapping[str, Any]


def hf_overrides(path: Path) -> list[str]:
    """The overrides, as `moedist train` takes them, that give the model of a ``config.json`` (or of its folder).

    Raises:
        ConfigError: it cannot be read, or its ``model_type`` is none that is known here.
    """
    path = path.expanduser()
    path = path / "config.json" if path.is_dir() else path
    remedy = "Name the config.json of a model, or its folder."
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(KEY, str(path), f"cannot be read ({error.strerror})", remedy) from error
    except ValueError as error:
        raise ConfigError(KEY, str(path), f"is no JSON ({error})", remedy) from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in FAMILIES:
        problem = f"has the model_type {kind!r}"
        raise ConfigError(KEY, str(path), problem, f"Known here: {', '.join(sorted(FAMILIES))}.")
    try:
        return [f"{key}={_text(value)}" for key, value in FAMILIES[kind](values).items()]
    except KeyError as error:
        raise ConfigError(KEY, str(path), f"lacks the key {error.args[0]}", remedy) from error


def _text(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _decoder(values: Values) -> dict[str, object]:
    """What all families share: sizes outside of attentions and MoE layers, dropless routing."""
    return {
        "experiment": None,
        "data": "tokens",
        "data.vocab_size": values["vocab_size"],
        "train.precision": "bf16",
        "mesh.device": "cuda",
        "train.sequence_length": 4096,
        "train.micro_batch": 1,
        "train.activation_checkpointing": "full",
        "model.dim": values["hidden_size"],
        "model.norm.eps": values.get("rms_norm_eps", 1e-6),
        "model.layers.num_layers": values["num_hidden_layers"],
        "model.tie_embeddings": values.get("tie_word_embeddings", False),
        "moe.capacity.factor": None,
    }


def _theta(values: Values) -> float:
    """Newer files keep it among the parameters of the rotation."""
    parameters = values.get("rope_parameters") or {}
    return float(values.get("rope_theta") or parameters.get("rope_theta") or 10_000.0)


def _grouped(values: Values, qk_norm: str | None) -> dict[str, object]:
    return {
        "model.attention.num_heads": values["num_attention_heads"],
        "model.attention.num_kv_heads": values.get("num_key_value_heads"),
        "model.attention.head_dim": values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"],
        "model.attention.rope_theta": _theta(values),
        "model.attention.qk_norm": qk_norm,
        "model.attention.bias": values.get("attention_bias", False),
    }


def _mixtral(values: Values) -> dict[str, object]:
    return {
        **_decoder(values),
        **_grouped(values, None),
        "moe.num_experts": values["num_local_experts"],
        "moe.router.top_k": values["num_experts_per_tok"],
        "moe.experts.hidden_dim": values["intermediate_size"],
    }


def _olmoe(values: Values) -> dict[str, object]:
    return {
        **_decoder(values),
        **_grouped(values, "projection"),
        "moe.num_experts": values["num_experts"],
        "moe.router.top_k": values["num_experts_per_tok"],
        "moe.router.renormalize": values.get("norm_topk_prob", False),
        "moe.experts.hidden_dim": values["intermediate_size"],
    }


def _qwen3_moe(values: Values) -> dict[str, object]:
    return {
        **_decoder(values),
        **_grouped(values, "head"),
        "model.layers.moe_every": values.get("decoder_sparse_step", 1),
        "model.ffn.hidden_dim": values.get("intermediate_size"),
        "moe.num_experts": values["num_experts"],
        "moe.router.top_k": values["num_experts_per_tok"],
        "moe.router.renormalize": values.get("norm_topk_prob", False),
        "moe.experts.hidden_dim": values["moe_intermediate_size"],
    }


def _deepseek_v3(values: Values) -> dict[str, object]:
    """Without the modules that predict further tokens (``num_nextn_predict_layers``)."""
    groups = {"num_groups": values["n_group"], "top_groups": values["topk_group"], "score": "top2_sum"}
    return {
        **_decoder(values),
        "moe": "deepseek_v3",
        "model/attention": "mla",
        "model.attention.num_heads": values["num_attention_heads"],
        "model.attention.query_rank": values["q_lora_rank"],
        "model.attention.kv_rank": values["kv_lora_rank"],
        "model.attention.head_dim": values["qk_nope_head_dim"],
        "model.attention.rope_dim": values["qk_rope_head_dim"],
        "model.attention.value_dim": values["v_head_dim"],
        "model.attention.rope_theta": _theta(values),
        "model.layers.first_dense": values["first_k_dense_replace"],
        "model.ffn.hidden_dim": values["intermediate_size"],
        "moe.num_experts": values["n_routed_experts"],
        "moe.shared_hidden_dim": values["n_shared_experts"] * values["moe_intermediate_size"],
        "moe.router.top_k": values["num_experts_per_tok"],
        "moe.router.renormalize": values["norm_topk_prob"],
        "moe.router.scale": values["routed_scaling_factor"],
        **{f"moe.router.groups.{key}": value for key, value in groups.items()},
        "moe.experts.hidden_dim": values["moe_intermediate_size"],
    }


FAMILIES: dict[str, Callable[[Values], dict[str, object]]] = {
    "deepseek_v3": _deepseek_v3,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen3_moe": _qwen3_moe,
}
"""By ``model_type``."""
