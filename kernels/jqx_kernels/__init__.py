# SPDX-License-Identifier: Apache-2.0
"""Low-level arithmetic on arrays: element codecs on bits, and the kernels built from them."""
