# SPDX-License-Identifier: Apache-2.0
"""Exports of tiny models by ModelOpt: `python tests/golden/make_exports.py` writes the folder
exports/ beside this file.

Made with nvidia-modelopt 0.47.0, torch 2.13.0 (CPU) and transformers 5.14.1. Kept are digests of
every file and tensor, the JSON files, the scales that follow from activations, and the inputs of
linears on the calibration ids.
"""

import copy
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import exports  # noqa: E402
import modelopt.torch.quantization as mtq  # noqa: E402
import torch  # noqa: E402
from modelopt.torch.export import export_hf_checkpoint  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

FP8 = {"num_bits": (4, 3), "axis": None}
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
CAST = {"fp8_cast": FP8, "nvfp4_cast": NVFP4}  # presets/kv/*_cast.yaml
KV_CONFIGS = {
    "fp8": "FP8_KV_CFG",
    "fp8_affine": "FP8_AFFINE_KV_CFG",
    "nvfp4": "NVFP4_KV_CFG",
    "nvfp4_affine": "NVFP4_AFFINE_KV_CFG",
}
INT4 = {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}
MIXED = (  # exports.MIXED
    ("*o_proj*weight_quantizer", {"cfg": FP8}),
    ("*o_proj*input_quantizer", {"cfg": FP8}),
    ("*.1.mlp.*weight_quantizer", {"cfg": INT4}),
    ("*.1.mlp.*input_quantizer", {"enable": False}),
    ("*.0.mlp.down_proj*", {"enable": False}),
)

KEPT = ("config.json", "hf_quant_config.json", "model.safetensors.index.json")


def make_base(folder: Path, model: str) -> dict:
    """The checkpoint as transformers saves it, its weights replaced by drawn ones; returns what is
    kept of it.
    """
    config = exports.MODELS[model]
    sizes = {k: v for k, v in config.items() if k not in ("model_type", "dtype")}
    empty = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **sizes), dtype=getattr(torch, config["dtype"])
    )
    empty.save_pretrained(folder)
    drawn = exports.tensors(model)
    saved = exports.read_tensors(folder)
    assert {n: tuple(shape) for n, (_, shape, _) in saved.items()} == {
        n: a.shape for n, a in drawn.items()
    }
    save_file(drawn, folder / "model.safetensors", {"format": "pt"})
    files = {
        name: (folder / name).read_text() for name in ("config.json", "generation_config.json")
    }
    return {"files": files, "weights": exports.short((folder / "model.safetensors").read_bytes())}


def load(folder: Path, model: str):
    dtype = getattr(torch, exports.MODELS[model]["dtype"])
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def record(folder: Path, model: str) -> None:
    """Save the inputs of the linears on the calibration ids, once for linears that share them."""
    found = {}

    def keep(name: str):
        def hook(_, inputs):
            i = sum(key.startswith(name + "|") for key in found)
            raw = inputs[0].detach().clone().contiguous()
            found[f"{name}|{i}"] = raw.view(torch.int16).numpy().view(exports.DTYPES["bfloat16"])

        return hook

    net = load(folder, model)
    for name, module in net.named_modules():
        if name.endswith(("q_proj", "o_proj", "gate_proj", "down_proj")):
            module.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        for batch in torch.from_numpy(exports.token_ids(model)):
            net(batch)
    save_file(found, exports.GOLDEN / f"{model}_acts.safetensors")


def quant_config(row: exports.Export) -> dict:
    config = copy.deepcopy(getattr(mtq, exports.CONFIGS.get(row.recipe, "NVFP4_DEFAULT_CFG")))
    if row.recipe == "mixed":
        config["quant_cfg"] += [{"quantizer_name": name, **entry} for name, entry in MIXED]
    if row.kv in CAST:
        entries = [
            {
                "quantizer_name": "*[kv]_bmm_quantizer",
                "cfg": {**CAST[row.kv], "use_constant_amax": True},
            }
        ]
    elif row.kv in KV_CONFIGS:
        entries = copy.deepcopy(getattr(mtq, KV_CONFIGS[row.kv])["quant_cfg"])
    else:
        entries = []
    config["quant_cfg"] = [*config["quant_cfg"], *entries]
    return config


def export(folder: Path, out: Path, row: exports.Export) -> dict:
    net = load(folder, row.model)
    ids = torch.from_numpy(exports.token_ids(row.model))
    mtq.quantize(net, quant_config(row), lambda m: [m(batch) for batch in ids])
    with torch.inference_mode():
        export_hf_checkpoint(net, export_dir=str(out), max_shard_size=row.shard)
    texts = {name: (out / name).read_text() for name in KEPT if (out / name).exists()}
    config = json.loads(texts.pop("config.json"))
    found = {
        "files": {f.name: exports.short(f.read_bytes()) for f in sorted(out.glob("*.safetensors"))},
        "texts": texts,
        "quantization_config": config.pop("quantization_config"),
    }
    assert config == json.loads((folder / "config.json").read_text())
    if row.detailed:
        found |= {"tensors": exports.digests(out), "calibrated": exports.calibrated(out)}
    return found


def main() -> None:
    torch.set_num_threads(1)
    exports.GOLDEN.mkdir(exist_ok=True)
    found: dict[str, dict] = {"models": {}, "exports": {}}
    with tempfile.TemporaryDirectory() as root:
        for model in exports.MODELS:
            found["models"][model] = make_base(Path(root) / model, model)
            if model in exports.BATCHES:
                record(Path(root) / model, model)
        for row in exports.EXPORTS:
            print(row.key, flush=True)
            found["exports"][row.key] = export(Path(root) / row.model, Path(root) / row.key, row)
    (exports.GOLDEN / "exports.json").write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    main()
