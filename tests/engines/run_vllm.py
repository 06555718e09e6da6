# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in vLLM: `python run_vllm.py REQUEST OUT`, in the environment of make_env.sh.

REQUEST is a JSON file: `models`, key -> directory; `prompts`, lists of token ids; `new_tokens`;
`dtype`; `emulate`, whether the kernels of emulation.py are there. A JSON line for every model is
added to OUT: its `key`, the greedy `tokens` after each prompt, the `logprobs` of the prompts'
tokens but the first, and the `method` of a linear, or an `error`; and `versions`.
"""

import gc
import json
import os
import sys
import time

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_MXFP8_EMULATION_DEQUANT_AT_LOAD": "0",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
"""One process, one GiB for keys and values, nothing from or to a network."""

LENGTH = 256
"""Tokens of a prompt and what follows it."""


def opened(folder, request):
    """The engine with one model."""
    from vllm import LLM

    more = {"compilation_config": {"custom_ops": ["none"]}} if request["emulate"] else {}
    return LLM(
        model=folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype=request["dtype"],
        max_model_len=LENGTH,
        max_num_seqs=4,
        disable_log_stats=True,
        **more,
    )


def answers(llm, request):
    """Tokens and logprobs of all prompts."""
    from vllm import SamplingParams

    asked = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    sampling = SamplingParams(
        temperature=0,
        max_tokens=request["new_tokens"],
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=0,
    )
    found = llm.generate(asked, sampling, use_tqdm=False)
    return {
        "tokens": [list(one.outputs[0].token_ids) for one in found],
        "logprobs": [
            [at[token].logprob for at, token in zip(one.prompt_logprobs[1:], ids[1:], strict=True)]
            for one, ids in zip(found, request["prompts"], strict=True)
        ],
    }


def method_of(llm):
    """The classes that hold and multiply the first linear, as far as they can be found."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    layer = executor.driver_worker.worker.model_runner.model.model.layers[0].self_attn.qkv_proj
    method = layer.quant_method
    inner = getattr(layer, "scheme", None) or method
    kernel = getattr(inner, "kernel", None) or getattr(inner, "fp8_linear", None) or inner
    return f"{type(method).__name__}, {type(kernel).__name__}"


def versions():
    """What runs here."""
    import compressed_tensors
    import torch
    import transformers
    import vllm

    return {m.__name__: m.__version__ for m in (vllm, torch, transformers, compressed_tensors)}


def shut(llm):
    """Give back what the engine holds."""
    from vllm.distributed import cleanup_dist_env_and_memory

    if llm is not None:
        llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    gc.collect()


def told(folder, request):
    """What is written for one model."""
    llm, start = None, time.monotonic()
    try:
        llm = opened(folder, request)
        found = {"loads": True, "method": method_of(llm)}
        found |= answers(llm, request)
    except Exception as error:
        found = {"loads": llm is not None, "error": f"{type(error).__name__}: {error}"[:2000]}
    shut(llm)
    return found | {"versions": versions(), "seconds": round(time.monotonic() - start, 1)}


def main(request_file, out):
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    os.environ.update(SETTINGS)
    if request["emulate"]:
        import emulation

        emulation.register()
    for key, folder in request["models"].items():
        line = json.dumps({"key": key, **told(folder, request)})
        with open(out, "a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
