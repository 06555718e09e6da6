# SPDX-License-Identifier: Apache-2.0
"""Plans of models of which only config.json is here: counts that are published, and what is said
where that is not enough.
"""

import json
import math
import shutil

import exports
import pytest
from command import jqx, refused

from jqx.models import param_shapes
from jqx_interop.families import spec_from_config
from jqx_interop.job import prepare
from jqx_interop.outlines import open_outline
from jqx_interop.plan import make_plan
from jqx_interop.settings import Settings

DEEPSEEK = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
    "n_routed_experts": 256, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "qk_nope_head_dim": 128, "first_k_dense_replace": 3,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip
LITE = DEEPSEEK | {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
    "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2,
    "n_routed_experts": 64, "q_lora_rank": None, "first_k_dense_replace": 1,
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048,
    "intermediate_size": 5632, "moe_intermediate_size": 1408, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60,
    "shared_expert_intermediate_size": 5632, "torch_dtype": "bfloat16",
}  # fmt: skip
OLMOE = {
    "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024,
    "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
    "num_experts": 64, "torch_dtype": "bfloat16",
}  # fmt: skip
PUBLISHED = {
    "DeepSeek-V3": (DEEPSEEK, 671_026_419_200),
    "DeepSeek-V2-Lite": (LITE, 15_706_484_224),
    "Mixtral-8x7B": (MIXTRAL, 46_702_792_704),
    "Qwen3-30B-A3B": (QWEN3, 30_532_122_624),
    "Qwen1.5-MoE-A2.7B": (QWEN2, 14_315_784_192),
    "OLMoE-1B-7B": (OLMOE, 6_919_161_856),
}
"""Model -> its configuration, and the number of its parameters that the Hub tells."""


def written(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(tmp_path, name):
    config, count = PUBLISHED[name]
    tensors = open_outline(written(tmp_path / "model", config)).tensors
    assert sum(math.prod(tensor.shape) for tensor in tensors.values()) == count


def test_a_family_has_its_parameters(tmp_path):
    config = exports.MODELS["qwen2"]
    tensors = open_outline(written(tmp_path / "model", config)).tensors
    shapes = param_shapes(spec_from_config(config))
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
    assert list(tensors) == list(shapes)


SMALL = {
    "model_type": "deepseek_v3", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512,
    "moe_intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "n_shared_experts": 1, "n_routed_experts": 8, "kv_lora_rank": 64, "q_lora_rank": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 64, "qk_nope_head_dim": 64, "first_k_dense_replace": 1,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip


@pytest.mark.parametrize("whole", [False, True], ids=["directory", "file"])
def test_the_command_names_engines(tmp_path, whole):
    folder = written(tmp_path / "model", SMALL)
    given = folder / "config.json" if whole else folder
    code, out, err = jqx("quantize", given, "--plan", "--qformat", "nvfp4", "--json")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    assert plan["engines"]["vllm"]["loads"] is True
    assert plan["engines"]["transformers"]["loads"] is False
    experts = [x for x in plan["linears"] if ".experts." in x["path"]]
    assert len(experts) == 2 * 8 * 3
    assert plan["tokens"] == 512 * 512
    assert len(plan["notes"]) == 1
    assert plan["source_bytes"] > plan["output_bytes"] > plan["source_bytes"] / 4
    code, out, _ = jqx("quantize", given, "--plan", "--qformat", "fp8_pc_pt")
    assert code == 0
    assert "no weights are here" in out


def test_a_plan_of_a_family_counts_its_calibration(tmp_path):
    folder = written(tmp_path / "model", exports.MODELS["llama"])
    asked = ("--plan", "--qformat", "nvfp4", "--json", "--calib-size", "8", "--calib-seq", "32")
    plan = json.loads(jqx("quantize", folder, *asked)[1])
    assert plan["tokens"] == 8 * 32
    assert plan["notes"] == [
        "no weights are here: this is what bfloat16 ones by config.json would give"
    ]
    base = exports.write_base(tmp_path / "llama", "llama")
    acts = exports.write_activations(tmp_path / "acts.safetensors", "llama")
    asked = ("--plan", "--qformat", "nvfp4", "--json", "--activations", acts)
    whole = json.loads(jqx("quantize", base, *asked)[1])
    for key in ("linears", "output_bytes", "coverage", "engines", "files"):
        assert plan[key] == whole[key]


GIB = 2**30


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4_gptq"])
def test_experts_are_not_in_memory_together(tmp_path, monkeypatch, recipe):
    """Those of a block of DeepSeek-V3 take 42 GiB in float32, and their second moments 53: these
    lie in files, and so do states.
    """
    monkeypatch.setattr("jqx_interop.plan._best", lambda work: 1e-3)
    monkeypatch.setattr("jqx_interop.plan.callers", lambda: 2)
    config = DEEPSEEK | {"num_hidden_layers": 5, "num_nextn_predict_layers": 1}
    config |= {"n_group": 8, "topk_group": 4, "num_experts_per_tok": 8}
    job = prepare(written(tmp_path / "model", config), recipe, Settings(), planned=True)
    plan = make_plan(job, 512 * 512)
    moments = 256 * 4 * (7168**2 + 2048**2)
    states = 512 * 512 * 7168 * 4
    assert plan.spilled_bytes == 2 * states + 4 * states + (3 * moments if "gptq" in recipe else 0)
    assert plan.peak_memory_bytes < (8 if recipe == "nvfp4" else 20) * GIB
    assert plan.output_bytes > 2 * 256 * 3 * 7168 * 2048 * 0.5
    assert plan.notes[1:] == (
        "layers that predict further tokens go on as they are and are not counted: 1",
    )


def test_kept_numbers_stay_wide(tmp_path):
    folder = written(tmp_path / "model", SMALL)
    job = prepare(folder, "w4a16_nvfp4", Settings(), planned=True)
    kinds = {t.dtype for t in job.outputs if t.name.endswith("e_score_correction_bias")}
    assert kinds == {"F32"}


WRONG = {
    "a stranger": ({"model_type": "unheard"}, "unknown model_type 'unheard'"),
    "no type": ({"model_type": None}, "unknown model_type 'None'"),
    "a size is missing": ({"kv_lora_rank": None}, "lacks kv_lora_rank"),
    "a size is text": ({"hidden_size": "256"}, "hidden_size = '256'"),
    "too many": ({"n_routed_experts": 10**9}, "1000000000 experts; no model has more than"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_configurations_that_say_too_little(tmp_path, changes, message):
    folder = written(tmp_path / "model", SMALL | changes)
    refused("quantize", folder, "--plan", "--qformat", "fp8_pc_pt", saying=message)


def test_weights_are_needed_to_run(tmp_path):
    folder = written(tmp_path / "model", SMALL)
    refused("quantize", folder, tmp_path / "out", "--qformat", "fp8_pc_pt", saying="safetensors")
    refused("quantize", folder / "config.json", tmp_path / "out", saying="is a file")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    refused("quantize", folder, "--plan", "--qformat", "fp8_pc_pt", saying="LFS")
    shutil.rmtree(folder)
    refused("quantize", folder, "--plan", saying="no such directory")


def test_what_would_be_refused_is_not_planned(tmp_path):
    folder = written(tmp_path / "model", SMALL)
    asked = ("--plan", "--qformat", "int8_smoothquant", "--low-memory")
    refused("quantize", folder, *asked, saying="--low-memory compresses weights before any input")
