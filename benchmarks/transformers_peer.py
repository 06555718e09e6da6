# SPDX-License-Identifier: Apache-2.0
"""Generation by transformers, as a process that answers questions: python transformers_peer.py
MODEL THREADS.

Greedy, with its cache, in bfloat16. Runs in the peer's environment (torch, transformers), never in
ours.
"""

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
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria

    class Timed(StoppingCriteria):
        """Called after every token, in batches too."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model_dir = Path(sys.argv[1])
    torch.set_num_threads(int(sys.argv[2]))
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    weights = sum(p.nbytes for p in model.parameters())
    tied = model.config.tie_word_embeddings
    unread = 0 if tied else model.get_input_embeddings().weight.nbytes
    for line in sys.stdin:
        asked = json.loads(line)
        ids, new, timed = torch.tensor(asked["ids"]), asked["new"], Timed()
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=[timed],
            )
        reply = {
            "prefill": timed.times[0] - start,
            "decode": timed.times[-1] - timed.times[0],
            "weights": weights,
            "read": weights - unread,
            "files": sum(file.stat().st_size for file in model_dir.glob("*.safetensors")),
            "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
