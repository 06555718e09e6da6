# SPDX-License-Identifier: Apache-2.0
"""ENGINES: the programs that serve a checkpoint, as rows.

What they accept is in accepts.py, how they read lists of ignored modules in matching.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from jqx.errors import nearest

ALL = "all"
RAN = "source read, and run on a CPU in part"
READ = "source read, not run"


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """One engine. `evidence`: how its rules became known. `unknown`: what it does with a tensor it
    does not know, None where that was not read. `fuses`: whether it makes one matrix of linears
    that read the same input, so that they must agree. `chips`: what its capabilities count.
    """

    name: str
    title: str
    version: str
    evidence: str
    unknown: str | None
    source: str
    fuses: bool = True
    chips: str = "compute capability"

    @property
    def label(self) -> str:
        """Title and version, for people."""
        return f"{self.title} {self.version}"


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            name="vllm",
            title="vLLM",
            version="0.32",
            evidence=RAN,
            unknown="it refuses to load",
            source="vLLM 0.32 model_executor/models/utils.py",
        ),
        Engine(
            name="sglang",
            title="SGLang",
            version="0.5.23",
            evidence=READ,
            unknown="it warns, drops the tensor and computes something else",
            source="SGLang 0.5.23 srt/models/llama.py",
        ),
        Engine(
            name="trtllm",
            title="TensorRT-LLM",
            version="(August 2026)",
            evidence=READ,
            unknown="it has no place for it",
            source="TensorRT-LLM _torch/modules/linear.py (read, not run)",
        ),
        Engine(
            name="tpu-vllm",
            title="vLLM on TPU",
            version="0.32",
            evidence=READ,
            unknown="it refuses to load",
            source="tpu-inference 0.32 layers/vllm/quantization, and vLLM 0.32",
            chips="TPU",
        ),
        Engine(
            name="transformers",
            title="transformers",
            version="5.19",
            evidence=RAN,
            unknown="it warns and drops the tensor",
            source="transformers 5.19 modeling_utils.py",
            fuses=False,
            chips="any device of PyTorch",
        ),
    )
}


def find_engines(names: Iterable[str]) -> tuple[Engine, ...]:
    """The rows of `names`, in their order, each once; "all" is every row.

    Raises InputError for a name that is none.
    """
    found: dict[str, Engine] = {}
    for name in names:
        if name != ALL and name not in ENGINES:
            raise nearest(name, (*ENGINES, ALL), "engine")
        found |= ENGINES if name == ALL else {name: ENGINES[name]}
    return tuple(found.values())
