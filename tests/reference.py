# SPDX-License-Identifier: Apache-2.0
"""The formats in slow NumPy, written from their equations: tables of values, searches, loops over
blocks.

Floats below 2^-126 are zero in the arithmetic that the definitions leave to the machine (`flush`).
"""

import ml_dtypes
import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E3M2 = np.array(
    [m / 16 for m in range(4)] + [(4 + m) * 2.0 ** (e - 5) for e in range(1, 8) for m in range(4)]
)
E4M3 = np.array(
    [m * 2.0**-9 for m in range(8)]
    + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)]
)[:-1]
NF4_LOW = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
NF4_HIGH = [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1]
# four decimals, kept in bfloat16, as the reference tool has them
NF4 = np.array(NF4_LOW + NF4_HIGH, ml_dtypes.bfloat16).astype(np.float64)
TINY = np.float32(2.0**-126)

# element, rows and columns of a block (0: the whole axis), kind of scale, bound of the tensor scale
ROWS = {
    "fp8": ("e4m3", 0, 0, "float32", None),
    "fp8_channel": ("e4m3", 1, 0, "float32", None),
    "fp8_block": ("e4m3", 128, 128, "float32", None),
    "int8": ("int8", 1, 0, "float32", None),
    "int8_tensor": ("int8", 0, 0, "float32", None),
    "int4": ("int4", 1, 128, "float32", None),
    "int4_fp8": ("int4", 1, 128, "float32", 448.0),
    "nvfp4": ("e2m1", 1, 16, "e4m3", 2688.0),
    "nvfp4_46": ("e2m1", 1, 16, "e4m3", 1536.0),
    "nvfp4_b32": ("e2m1", 1, 32, "e4m3", 2688.0),
    "nvfp4_b32_fp8": ("e2m1", 1, 32, "e4m3", 448.0),
    "mxfp4": ("e2m1_down", 1, 32, "e8m0", None),
    "mxfp8": ("e4m3", 1, 32, "e8m0", None),
    "mxfp6": ("e3m2", 1, 32, "e8m0", None),
    "mxint8": ("int8", 1, 32, "e8m0", None),
    "nf4": ("nf4", 1, 64, "float32", None),
}
BOUND = {"e4m3": 448.0, "e3m2": 28.0, "int8": 127.0, "int4": 7.0, "e2m1": 6.0, "e2m1_down": 6.0}
BOUND["nf4"] = 1.0
ROUNDED_TWICE = ("fp8", "nf4")  # quotients are rounded to the dtype of the weight first


def flush(x):
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x).astype(np.float32)


def nearest(table, a, ties="even"):
    """Index of the entry of the ascending `table` nearest to a >= 0; beyond the end is the last."""
    middles = (table[1:] + table[:-1]) / 2
    a = np.asarray(a, np.float64)
    below = np.searchsorted(middles, a, side="left")  # a tie goes to the smaller entry
    tie = (below < len(middles)) & (a == middles[np.minimum(below, len(middles) - 1)])
    return np.where(tie & (below % 2 == 1), below + 1, below) if ties == "even" else below


def e4m3(q, x=None):
    return (nearest(E4M3, np.abs(q)) | (np.signbit(q) << 7)).astype(np.uint8)


def e3m2(q, x=None):
    return (nearest(E3M2, np.abs(q)) | (np.signbit(q) << 5)).astype(np.uint8)


def e2m1(q, x=None):
    return (nearest(E2M1, np.abs(q)) | ((q if x is None else x) < 0) << 3).astype(np.uint8)


def e2m1_down(q, x=None):
    return (nearest(E2M1, np.abs(q), "down") | ((q if x is None else x) <= 0) << 3).astype(np.uint8)


def integer(q, width):
    return (
        np.clip(np.rint(q), -(2 ** (width - 1)), 2 ** (width - 1) - 1)
        .astype(np.int8)
        .view(np.uint8)
    )


CODE = {
    "e4m3": e4m3,
    "e3m2": e3m2,
    "e2m1": e2m1,
    "e2m1_down": e2m1_down,
    "int8": lambda q, x: integer(q, 8),
    "int4": lambda q, x: integer(q, 4) & 15,
    "nf4": lambda q, x: np.abs(q.astype(np.float64)[..., None] - NF4).argmin(-1).astype(np.uint8),
}


def value(element, code):
    """float32 values of codes 0..255, one a byte."""
    c = code.astype(np.int64)
    if element == "nf4":
        return NF4[c & 15].astype(np.float32)
    table = {"e4m3": (E4M3, 7), "e3m2": (E3M2, 5), "e2m1": (E2M1, 3), "e2m1_down": (E2M1, 3)}
    if element in table:
        values, sign = table[element]
        return (values[c & ((1 << sign) - 1)] * np.where(c >> sign, -1, 1)).astype(np.float32)
    return np.where(
        c >= {"int8": 128, "int4": 8}[element], c - {"int8": 256, "int4": 16}[element], c
    ).astype(np.float32)


def blocks(shape, rows, cols):
    """(i, j, slice) of every block of a matrix; the last ones may be smaller."""
    rows, cols = rows or shape[0], cols or shape[1]
    for i in range(-(-shape[0] // rows)):
        for j in range(-(-shape[1] // cols)):
            yield i, j, np.s_[i * rows : (i + 1) * rows, j * cols : (j + 1) * cols]


def block_amax(w, rows, cols):
    grid = {
        (i, j): np.abs(w[s].astype(np.float32)).max() for i, j, s in blocks(w.shape, rows, cols)
    }
    return np.array(list(grid.values()), np.float32).reshape(max(grid)[0] + 1, max(grid)[1] + 1)


def exponent(amax, bound):
    """ceil(log2(amax / bound)) with a correctly rounded float32 log2, in -127..127; -127 for
    zero.
    """
    ratio = np.float64(np.float32(amax) / np.float32(bound))
    return (
        -127 if ratio < 2.0**-149 else int(np.clip(np.ceil(np.float32(np.log2(ratio))), -127, 127))
    )


def float32_scale(amax, name, dtype):
    element, rows, cols, _, _ = ROWS[name]
    bound = np.float32(BOUND[element])
    kept = (
        dtype if rows == 128 or (rows and not cols) else np.float32
    )  # where the smallest amax is decided
    smallest = np.float32(2.0**-14 if np.dtype(kept) == np.float16 else TINY)
    amax = np.where(amax == 0, bound, np.maximum(amax, smallest)).astype(np.float32)
    return np.maximum(flush(amax / bound), TINY)


def tensor_scale_of(w, amax, bound):
    """amax / bound, 1 for zeros; amax is that of `w` unless one is given."""
    g = np.float32(np.abs(w).max() if amax is None else amax)
    return flush((g if g else np.float32(bound)) / np.float32(bound))


def nvfp4_scales(w, amax, name):
    """tensor scale, codes of the block scales, and their product."""
    _, _, cols, _, bound = ROWS[name]
    s2 = np.maximum(tensor_scale_of(w, amax, bound), TINY)
    a = block_amax(w, 1, cols)
    s = np.where(a == 0, np.float32(1), flush(a) / (np.float32(6) * s2))
    code = nearest(E4M3, np.clip(s, 2.0**-9, 448)).astype(np.uint8)
    return s2, code, np.maximum(flush(E4M3[code].astype(np.float32) * s2), TINY)


def quantize(w, name, amax=None):
    """Codes one a byte, stored scales as uint8 or float32, tensor scale or None, float32 step of
    every block.
    """
    element, rows, cols, kind, bound = ROWS[name]
    x = w.astype(np.float32)
    tensor_scale = None if bound is None else np.maximum(tensor_scale_of(x, None, bound), TINY)
    if kind == "e4m3":
        tensor_scale, scale, step = nvfp4_scales(x, amax, name)
    else:
        a = block_amax(x, rows, cols) if amax is None else np.asarray(amax, np.float32)
    if kind == "float32":
        scale = step = float32_scale(a, name, w.dtype).reshape(block_amax(x, rows, cols).shape)
    if kind == "e8m0":
        e = np.array([[exponent(v, BOUND[element]) for v in row] for row in a])
        scale, step = (e + 127).astype(np.uint8), np.exp2(e.astype(np.float32))
    codes = np.zeros(w.shape, np.uint8)
    with np.errstate(over="ignore"):
        for i, j, s in blocks(w.shape, rows, cols):
            q = x[s] / step[i, j] if kind == "e8m0" else flush(flush(x[s]) / step[i, j])
            q = q.astype(w.dtype).astype(np.float32) if name in ROUNDED_TWICE else q
            codes[s] = CODE[element](q, x[s])
    return codes, scale.reshape(()) if (rows, cols) == (0, 0) else scale, tensor_scale, step


def pack(codes, name):
    """Byte by byte: two neighbours of a row, or of a column for int4, the first in the low nibble;
    in the high one for nf4.
    """
    element, n, k = ROWS[name][0], *codes.shape
    if element == "int4":
        return np.array(
            [[codes[2 * r, c] + 16 * codes[2 * r + 1, c] for c in range(k)] for r in range(n // 2)],
            np.uint8,
        )
    if element == "nf4":
        return codes[:, ::2] * 16 + codes[:, 1::2]
    if element in ("e2m1", "e2m1_down"):
        return np.array(
            [[codes[r, 2 * c] + 16 * codes[r, 2 * c + 1] for c in range(k // 2)] for r in range(n)],
            np.uint8,
        )
    return codes


def encode(w, name, amax=None):
    """What is stored: packed codes as uint8, scales as uint8 or float32, tensor scale or None."""
    codes, scale, tensor_scale, _ = quantize(w, name, amax)
    return pack(codes, name), scale, tensor_scale


def decode(w, name, amax=None):
    """The float32 matrix that the stored form of `w` stands for."""
    codes, _, _, step = quantize(w, name, amax)
    element, rows, cols, _, _ = ROWS[name]
    out = np.zeros(w.shape, np.float32)
    for i, j, s in blocks(w.shape, rows, cols):
        out[s] = flush(value(element, codes[s]) * flush(step[i, j]))
    return out


# --- activations
# element, values per scale (0: all of it, 1: a token), bound of a scale that is stored
INPUTS = {
    "fp8": ("e4m3", 0, 448.0),
    "fp8_token": ("e4m3", 1, None),
    "int8": ("int8", 0, 127.0),
    "int8_token": ("int8", 1, None),
    "nvfp4": ("e2m1", 16, 2688.0),
    "mxfp4": ("e2m1", 32, None),
    "mxfp8": ("e4m3", 32, None),
    "mxfp6": ("e3m2", 32, None),
    "mxint8": ("int8", 32, None),
}
CACHES = {"fp8": ("e4m3", 0, 1.0), "nvfp4": ("e2m1", 16, 6.0)}  # ..., k_scale / tensor scale


def scale_of(x, bound):
    return np.maximum(flush(np.abs(x).max() / np.float32(bound)), TINY)


@np.errstate(over="ignore")  # beyond float32 is infinity, as it is in the machine
def step_of(x, element, size, scale):
    """The step of the values `x` that share it. `scale`: the stored one, None where there is
    none.
    """
    largest = np.abs(x).max()
    if size == 32:
        return np.exp2(np.float32(exponent(largest, BOUND[element])))
    if size == 16:  # no smallest scale: a block may lose everything
        s = flush(largest) / (np.float32(6) * scale)
        return flush(E4M3[nearest(E4M3, min(s, 448))].astype(np.float32) * scale)
    if size == 1:
        return scale_of(x, BOUND[element]) if largest else np.float32(1)
    return scale


@np.errstate(over="ignore")
def through(x, element, step):
    """float32 values as they come back from codes of one step."""
    if step == 0:
        return np.zeros_like(x)
    q = np.float64(x) / step if np.frexp(step)[0] == 0.5 else flush(flush(x) / step)
    return flush(value(element, CODE[element](q, x)) * flush(step))


def activation(x, name, scale=None):
    """An input of a linear in the format `name`, in its own dtype."""
    element, size, bound = INPUTS[name]
    wide = x.astype(np.float32)
    if bound and scale is None:
        scale = scale_of(wide, bound)
    out = np.zeros_like(wide)
    for at in np.ndindex(x.shape[:-1]):
        for *_, s in blocks((1, x.shape[-1]), 1, size if size > 1 else 0):
            here = (*at, s[1])
            out[here] = through(wide[here], element, step_of(wide[here], element, size, scale))
    return out.astype(x.dtype)


def cached(x, name, scale=None, bias=None):
    """Keys or values [b, h, t, d] as they come out of a cache in the format `name`."""
    element, size, fold = CACHES[name.split("_")[0]]
    scale = np.float32(1 if scale is None else scale) / np.float32(fold)
    shift = np.float32(0) if bias is None else bias.astype(np.float32)
    wide = (x.astype(np.float32) - shift).astype(np.float32)
    out = np.zeros_like(wide)
    for at in np.ndindex(x.shape[:-1]):
        for *_, s in blocks((1, x.shape[-1]), 1, size):
            here = (*at, s[1])
            out[here] = through(wide[here], element, step_of(wide[here], element, size, scale))
    return (out + shift).astype(np.float32).astype(x.dtype)
