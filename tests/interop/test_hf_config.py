"""Published shapes from a Hugging Face ``config.json``: the same counts as from the recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moedist.cli.main import main
from moedist.config import ConfigError
from moedist.interop.hf_config import hf_overrides

# As published beside the weights, without what no shape depends on.
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rope_theta": 1000000.0,
    "vocab_size": 32000,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "vocab_size": 151936,
}
OLMOE = {
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "vocab_size": 50304,
}


def write(folder: Path, values: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("values", "total"),
    [
        (DEEPSEEK_V3, 671_026_404_352),
        (MIXTRAL, 46_702_792_704),
        (QWEN3_MOE, 30_532_122_624),
        (OLMOE, 6_919_161_856),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_published_totals(values: dict, total: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path, values)
    assert main(["estimate", "--hf", str(tmp_path), "--ranks", "1024", "mesh.ep=8", "mesh.fsdp=1024", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters_total"] == total


def test_what_is_no_known_config_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        hf_overrides(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="Known here: deepseek_v3"):
        hf_overrides(write(tmp_path, {"model_type": "llama"}))
    with pytest.raises(ConfigError, match="lacks the key vocab_size"):
        hf_overrides(write(tmp_path, {"model_type": "mixtral"}))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is no JSON"):
        hf_overrides(tmp_path)
