# SPDX-License-Identifier: Apache-2.0
"""One quantization by NVIDIA ModelOpt, as a process of its own: python modelopt_peer.py MODEL OUT
CONFIG IDS BLOCK THREADS [EMULATION].

Runs in the peer's environment (torch, transformers, nvidia-modelopt), never in ours.
"""

import copy
import importlib.util
import os
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")


def main() -> None:
    model_dir, out, name, ids_file, block, threads = sys.argv[1:7]
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
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    config = copy.deepcopy(getattr(mtq, name))
    for entry in config["quant_cfg"]:
        cfg = entry.get("cfg")
        if int(block) and isinstance(cfg, dict) and "block_sizes" in cfg:
            cfg["block_sizes"][-1] = int(block)
    batches = torch.from_numpy(np.load(ids_file))

    def forward_loop(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    weight_only = all(
        not entry.get("enable", True) or "input" not in entry["quantizer_name"]
        for entry in config["quant_cfg"]
    )
    data_free = weight_only and config["algorithm"] in (None, "max")
    mtq.quantize(model, config, None if data_free else forward_loop)
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=out)


if __name__ == "__main__":
    main()
