# SPDX-License-Identifier: Apache-2.0
"""ACCEPTS: which engine reads what, as rows: engine, layout and scheme -> whether it loads, on
which chips, and how that is known.

A row that is absent means that nothing was found out, which is not the same as no.
"""

from .accept import Accept
from .accepts_gpu import SGLANG, TRTLLM, VLLM, VLLM_CT
from .accepts_more import INT_LAYOUTS, TPU, TRANSFORMERS, UNQUANTIZED

ACCEPTS = {
    (row.engine, row.layout, row.scheme): row
    for row in (
        *(*VLLM, *VLLM_CT, *SGLANG, *TRTLLM, *TPU, *TRANSFORMERS),
        *(*INT_LAYOUTS, *UNQUANTIZED),
    )
}
"""(engine, layout, scheme) -> row."""


def find_accept(engine: str, layout: str, scheme: str) -> Accept:
    """The row; where there is none, one that says that it is not known."""
    row = ACCEPTS.get((engine, layout, scheme))
    if row is not None:
        return row
    note = f"what it does with {scheme} in the layout {layout} was not read"
    return Accept(
        engine=engine, layout=layout, scheme=scheme, loads=None, source="no rule here", note=note
    )
