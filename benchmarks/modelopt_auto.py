# SPDX-License-Identifier: Apache-2.0
"""Scores of NVIDIA ModelOpt's auto_quantize, by a process: python -P modelopt_auto.py MODEL
SCORES.json IDS.npy THREADS BLOCK RECIPE=CONFIG,RECIPE=CONFIG [EMULATION].

Runs in the peer's environment (torch, transformers, nvidia-modelopt), never in ours. IDS is
[batches, batch, length]. Recipes are our names of its configurations; heads do not count.
"""

import copy
import importlib.util
import json
import os
import resource
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")


def main() -> None:
    model_dir, out, ids_file, threads, block, formats = sys.argv[1:7]
    import numpy as np
    import torch

    torch.set_num_threads(int(threads))
    if len(sys.argv) > 7:
        spec = importlib.util.spec_from_file_location("emulation", sys.argv[7])
        assert spec is not None
        assert spec.loader is not None
        emulation = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(emulation)
        emulation.install_emulation()
    import modelopt.torch.quantization as mtq
    from transformers import AutoModelForCausalLM

    names = dict(pair.split("=") for pair in formats.split(","))
    configs = [copy.deepcopy(getattr(mtq, config)) for config in names.values()]
    for config in configs:
        for entry in config["quant_cfg"]:
            cfg = entry.get("cfg")
            if int(block) and isinstance(cfg, dict) and cfg.get("block_sizes", {}).get(-1) == 128:
                cfg["block_sizes"][-1] = int(block)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    batches = list(torch.from_numpy(np.load(ids_file)))
    start = time.monotonic()
    _, state = mtq.auto_quantize(
        model,
        constraints={
            "effective_bits": 9.0,
            "cost": {"excluded_module_name_patterns": ["*lm_head*"]},
        },
        quantization_formats=configs,
        data_loader=batches,
        forward_step=lambda model, batch: model(input_ids=batch, labels=batch),
        loss_func=lambda output, _: output.loss,
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        disabled_layers=["*lm_head*"],
    )
    seconds = time.monotonic() - start
    Path(out).write_text(
        json.dumps(
            {
                "seconds": seconds,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "scores": {
                    name.removesuffix(".quant_recipe"): dict(
                        zip(
                            (_recipe(str(f), names) for f in row["formats"]),
                            map(float, row["scores"]),
                            strict=True,
                        )
                    )
                    for name, row in state["candidate_stats"].items()
                },
            },
            indent=1,
        )
    )


def _recipe(told: str, names: dict[str, str]) -> str:
    """Our name of what ModelOpt prints of a format: one of its constants, or the changed ones in
    the order in which they were given.
    """
    for recipe, config in names.items():
        if told.startswith(config):
            return recipe
    return "none" if told.startswith("NONE") else told


if __name__ == "__main__":
    main()
