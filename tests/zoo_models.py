# SPDX-License-Identifier: Apache-2.0
"""Models as people write them: `CASES`, a name -> the function that makes the case."""

import zoo_equinox
import zoo_experts
import zoo_linen
import zoo_linen_loops
import zoo_nnx
import zoo_trees

CASES = {
    **zoo_linen.CASES,
    **zoo_linen_loops.CASES,
    **zoo_nnx.CASES,
    **zoo_equinox.CASES,
    **zoo_experts.CASES,
    **zoo_trees.CASES,
}
