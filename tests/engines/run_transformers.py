# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in transformers: `python run_transformers.py REQUEST OUT`; both files are those of
run_vllm.py.
"""

import contextlib
import json
import os
import sys
import time


def answers(model, request):
    """Tokens and logprobs of all prompts."""
    import torch

    tokens, logprobs = [], []
    for prompt in request["prompts"]:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            scores = model(ids).logits[0].float().log_softmax(-1)
            logprobs.append(scores[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist())
            for _ in range(request["new_tokens"]):
                last = model(ids).logits[0, -1].float()
                ids = torch.cat([ids, last.argmax().reshape(1, 1)], 1)
        tokens.append(ids[0, len(prompt) :].tolist())
    return {"tokens": tokens, "logprobs": logprobs}


def decompress(model, dtype):
    """The first call does it, of some formats to bfloat16 whatever the model has; it then fails."""
    import torch

    with contextlib.suppress(RuntimeError), torch.no_grad():
        model(torch.tensor([[0]]))
    model.to(dtype)


def versions():
    """What runs here."""
    import compressed_tensors
    import torch
    import transformers

    return {m.__name__: m.__version__ for m in (torch, transformers, compressed_tensors)}


def told(folder, request):
    """What is written for one model."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded, start = False, time.monotonic()
    try:
        dtype = getattr(torch, request["dtype"])
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        loaded, method = True, type(model.model.layers[0].self_attn.q_proj).__name__
        decompress(model.eval(), dtype)
        found = {"loads": True, "method": method, **answers(model, request)}
    except Exception as error:
        found = {"loads": loaded, "error": f"{type(error).__name__}: {error}"[:2000]}
    return found | {"versions": versions(), "seconds": round(time.monotonic() - start, 1)}


def main(request_file, out):
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    os.environ["HF_HUB_OFFLINE"] = "1"
    for key, folder in request["models"].items():
        line = json.dumps({"key": key, **told(folder, request)})
        with open(out, "a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
