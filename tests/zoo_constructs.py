# SPDX-License-Identifier: Apache-2.0
"""What JAX can do to a parameter and around its product: `CASES`, a name -> the function that makes
the case.
"""

import zoo_control
import zoo_loops
import zoo_parts
import zoo_products
import zoo_views

CASES = {
    **zoo_products.CASES,
    **zoo_views.CASES,
    **zoo_parts.CASES,
    **zoo_loops.CASES,
    **zoo_control.CASES,
}
