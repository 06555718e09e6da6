# SPDX-License-Identifier: Apache-2.0
"""ACCEPTS: which engine reads what, as rows: engine, layout and scheme -> whether it loads, on
which chips, and how that is known.

A row that is absent means that nothing was found out, which is not the same as no; but where an
engine takes the names of a layout it knows and refuses others, CLOSED says so.
"""

from dataclasses import replace

from .accept import Accept
from .accepts_gpu import SGLANG, SGLANG_NO, TRTLLM, TRTLLM_NO, VLLM, VLLM_CT, VLLM_NO
from .accepts_more import INT_LAYOUTS, TPU, TRANSFORMERS, UNQUANTIZED
from .schemes import AWQ, GPTQ

ACCEPTS = {
    (row.engine, row.layout, row.scheme): row
    for row in (
        *(*VLLM, *VLLM_CT, *SGLANG, *TRTLLM, *TPU, *TRANSFORMERS),
        *(*INT_LAYOUTS, *UNQUANTIZED),
    )
}
"""(engine, layout, scheme) -> row."""


CLOSED = {
    (row.engine, row.layout): row
    for row in (
        VLLM_NO,
        SGLANG_NO,
        replace(TRTLLM_NO, note="the name is none of its QuantAlgo"),
        replace(
            VLLM_NO,
            layout=GPTQ,
            note="it takes symmetric codes of 4 and 8 bits alone",
            source="vLLM 0.32 layers/quantization/auto_gptq.py TYPE_MAP",
        ),
        replace(
            VLLM_NO,
            layout=AWQ,
            note="it takes codes of 4 bits alone",
            source="vLLM 0.32 layers/quantization/auto_awq.py TYPE_MAP",
        ),
    )
}
"""(engine, layout) -> its answer to schemes that have no row."""


def find_accept(engine: str, layout: str, scheme: str) -> Accept:
    """The row; where there is none, one that says that it is not known."""
    row = ACCEPTS.get((engine, layout, scheme))
    if row is not None:
        return row
    if (engine, layout) in CLOSED:
        return replace(CLOSED[engine, layout], scheme=scheme)
    note = f"what it does with {scheme} in the layout {layout} was not read"
    return Accept(
        engine=engine, layout=layout, scheme=scheme, loads=None, source="no rule here", note=note
    )
