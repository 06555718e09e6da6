# SPDX-License-Identifier: Apache-2.0
"""Exports of a tiny model of every family by ModelOpt: `python tests/golden/make_family_exports.py`
writes family_exports.npz beside this file.

Made with nvidia-modelopt 0.47.0, torch 2.13.0 (CPU) and transformers 5.14.1. Kept are the largest
magnitude of every input channel of every linear, which is all that these recipes need of inputs,
digests of every tensor, and the JSON descriptions. Falcon and BLOOM are not among them: of the
former ModelOpt quantizes nothing, and it cannot export the latter.
"""

import copy
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import exports  # noqa: E402
from golden import make_families, make_models  # noqa: E402

FIXTURE = Path(__file__).with_name("family_exports.npz")

CONFIGS = {
    "fp8": "FP8_DEFAULT_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "int8_smoothquant": "INT8_SMOOTHQUANT_CFG",
}
"""Recipe -> the constant of ModelOpt."""

CASES = (
    *("qwen2_window_off", "qwen3_layer_types", "mistral_window", "gemma"),
    *("gemma2", "gemma3", "granite", "smollm3", "gptj", "gpt_neox", "mpt", "phi", "phi3"),
    *("nemotron", "glm", "glm4", "exaone4", "olmo2", "cohere", "cohere2", "stablelm"),
    *("starcoder2", "opt"),
)
WIDE = dict.fromkeys(("hidden_size", "n_embd", "d_model"), 64)
WIDE |= {"head_dim": 16} | dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 96)


def config_of(case: str) -> dict[str, Any]:
    """The config.json of a case, with sizes that blocks of 16 divide."""
    config = {**make_models.CASES, **make_families.CASES}[case]
    wide = {key: size for key, size in WIDE.items() if config.get(key) is not None}
    return copy.deepcopy(config | wide)


def packed(value: Any) -> np.ndarray:
    """Anything that JSON holds, as bytes."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def unpacked(array: np.ndarray) -> Any:
    """What was packed."""
    return json.loads(array.tobytes())


def drawn(names: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights in bfloat16 by the names they have in checkpoints."""
    return {
        name: make_families.weight(name, shape).astype(ml_dtypes.bfloat16)
        for name, shape in names.items()
    }


def make(case: str, folder: Path) -> dict[str, np.ndarray]:
    """What is kept of one case."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    base = folder / case
    given = AutoConfig.for_model(**config_of(case))
    AutoModelForCausalLM.from_config(given, dtype=torch.bfloat16).save_pretrained(base)
    shapes = {name: a.shape for name, a in load_file(base / "model.safetensors").items()}
    save_file(drawn(shapes), base / "model.safetensors", {"format": "pt"})
    kept = {f"{case}|base": packed([(base / "config.json").read_text(), shapes])}
    for recipe, constant in CONFIGS.items():
        out, met = folder / f"{case}-{recipe}", {}
        export(base, out, constant, met)
        tensors = exports.digests(out)
        texts = [(out / f).read_text() for f in ("config.json", "hf_quant_config.json")]
        kept[f"{case}|{recipe}"] = packed([tensors, *texts])
    readers: dict[bytes, list[str]] = {}
    for name, most in met.items():
        readers.setdefault(most.tobytes(), []).append(name)
    inputs = {",".join(names): met[names[0]] for names in readers.values()}
    return kept | {f"{case}|input|{names}": most for names, most in inputs.items()}


def export(base: Path, out: Path, constant: str, met: dict[str, np.ndarray]) -> None:
    """Quantize and write a model; `met` gets the largest magnitudes of the inputs of linears."""
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    ids = torch.from_numpy(make_families.token_ids())

    def keep(name: str):
        def hook(_, inputs):
            most = inputs[0].detach().float().abs().flatten(0, -2).amax(0)
            met[name] = (most.numpy().view(np.uint32) >> 16).astype(np.uint16)  # bfloat16

        return hook

    linears = {n: m for n, m in net.named_modules() if isinstance(m, torch.nn.Linear)}
    inside = {n: m for n, m in linears.items() if n not in ("lm_head", "embed_out")}
    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in inside.items()]
    with torch.no_grad():
        net(ids)
    for hook in hooks:
        hook.remove()
    mtq.quantize(net, copy.deepcopy(getattr(mtq, constant)), lambda m: m(ids))
    with torch.inference_mode():
        export_hf_checkpoint(net, export_dir=str(out))


def main() -> None:
    """Write the fixture."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    found: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            found |= make(case, Path(folder))
            print(case, flush=True)
    np.savez_compressed(FIXTURE, **found)
    print(FIXTURE, FIXTURE.stat().st_size)


if __name__ == "__main__":
    main()
