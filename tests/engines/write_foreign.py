# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that llm-compressor writes: `python write_foreign.py REQUEST OUT`, in the environment
of make_writer_env.sh.

REQUEST is a JSON file: `model`, a directory; `prompts`, lists of token ids to calibrate with;
`checkpoints`, key -> a list of modifiers, the name of each and its arguments; `folder`, where they
go, each into a directory of its key. A JSON line for each is added to OUT: its `key`, and an
`error` if there was one.
"""

import json
import os
import sys
from pathlib import Path


def written(modifiers, request, out):
    """Quantize the model by these modifiers and save it."""
    from datasets import Dataset
    from llmcompressor import modifiers as known
    from llmcompressor import oneshot
    from llmcompressor.modifiers import awq, gptq, quantization, smoothquant
    from transformers import AutoModelForCausalLM

    modules = (quantization, gptq, smoothquant, awq, known)
    found = [
        next(getattr(m, name) for m in modules if hasattr(m, name))(**arguments)
        for name, arguments in modifiers
    ]
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype="bfloat16")
    ids = request["prompts"]
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(p) for p in ids]})
    oneshot(
        model=model,
        dataset=data,
        recipe=found,
        max_seq_length=max(map(len, ids)),
        num_calibration_samples=len(ids),
        output_dir=str(out),
    )


def main(request_file, out):
    os.environ["HF_HUB_OFFLINE"] = "1"
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    for key, modifiers in request["checkpoints"].items():
        line = {"key": key}
        try:
            written(modifiers, request, Path(request["folder"]) / key)
        except Exception as error:
            line["error"] = f"{type(error).__name__}: {error}"[:2000]
        with open(out, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
