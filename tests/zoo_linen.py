# SPDX-License-Identifier: Apache-2.0
"""Cases of the zoo in Flax Linen: layers of the library, and models of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from by_hand import Layers, along_last, by_path, drawn
from zoo import Case, Draws

D, HEADS, C = 16, 2, 8


def linen(model, *args, **fields):
    """A case of `model.apply`, its variables being the parameters."""
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), *args))
    return Case(f=model.apply, params=params, args=args, **fields)


class MLP(nn.Module):
    width: int = 32

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(nn.LayerNorm()(x))
        x = nn.Dropout(0.5, deterministic=True)(nn.gelu(x))
        return nn.Dense(D)(x)


def mlp_by_hand(layers, path, x):
    h = layers.dense(f"{path}Dense_0", layers.layer_norm(f"{path}LayerNorm_0", x))
    return layers.dense(f"{path}Dense_1", jax.nn.gelu(h))


def mlp():
    return linen(
        MLP(),
        Draws()(2, 5, D),
        by_hand=lambda params, args, at: mlp_by_hand(Layers(at, by_path(params)), "", *args),
        contracted={"Dense_0.kernel": (0,), "Dense_1.kernel": (0,)},
    )


ATTENTION = {"query.kernel": (0,), "key.kernel": (0,), "value.kernel": (0,), "out.kernel": (0, 1)}


def self_attention():
    return linen(
        nn.MultiHeadDotProductAttention(num_heads=HEADS),
        Draws()(2, 5, D),
        by_hand=lambda params, args, at: Layers(at, by_path(params)).attention("", *args, *args),
        contracted=ATTENTION,
    )


def cross_attention():
    return linen(
        nn.MultiHeadDotProductAttention(num_heads=HEADS, use_bias=False),
        Draws()(2, 5, D),
        Draws(1)(2, 3, 24),
        by_hand=lambda params, args, at: Layers(at, by_path(params)).attention("", *args),
        contracted=ATTENTION,
    )


class General(nn.Module):
    """An image to heads, over two axes that lie apart, and one matrix for each position."""

    @nn.compact
    def __call__(self, x):  # [b, 4, 3, 8]
        x = nn.DenseGeneral((2, 4), axis=(1, -1), name="apart")(x)  # [b, 3, 2, 4]
        x = nn.DenseGeneral(16, axis=(-2, -1), name="joined")(x)  # [b, 3, 16]
        x = jnp.moveaxis(nn.gelu(x), 1, 0)
        return nn.DenseGeneral(D, axis=-1, batch_dims=0, name="each")(x)  # [3, b, D]


def general_by_hand(params, args, at):
    layers, (x,) = Layers(at, by_path(params)), args
    x = layers.dense("apart", jnp.moveaxis(x, 1, 2), summed=2)
    x = jax.nn.gelu(layers.dense("joined", x, summed=2))
    each = [layers.of("each", i).dense("each", x[:, i]) for i in range(3)]
    return jnp.stack(each)


def dense_general():
    return linen(
        General(),
        Draws()(2, 4, 3, 8),
        by_hand=general_by_hand,
        contracted={"apart.kernel": (0, 1), "joined.kernel": (0, 1), "each.kernel": (1,)},
        stack={"each.kernel": (0,)},
    )


class Convolved(nn.Module):
    """A convolution with strides, and one in groups."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=(2, 2), padding="VALID", name="first")(x))
        return nn.Conv(12, (2, 1), feature_group_count=4, padding="VALID", name="grouped")(x)


def patches(x, window, strides):
    """[b, rows, columns, c] -> [b, rows', columns', *window, c] without padding."""
    tall, broad = ((n - w) // s + 1 for n, w, s in zip(x.shape[1:3], window, strides, strict=True))

    def cut(r, c):
        return x[:, r :: strides[0], c :: strides[1]][:, :tall, :broad]

    rows = [jnp.stack([cut(r, c) for c in range(window[1])], 3) for r in range(window[0])]
    return jnp.stack(rows, 3)


def conv_by_hand(layers, path, x, window, strides=(1, 1), groups=1):
    """A convolution is told of pixels, and multiplies patches of them."""
    pixels = layers.at.input(f"{path}.kernel", x.reshape(-1, x.shape[-1]))
    seen = patches(pixels.reshape(x.shape), window, strides)
    x = seen.reshape(*seen.shape[:-1], groups, -1)
    w = layers.p[f"{path}.kernel"]
    w = w.reshape(*w.shape[:-1], groups, -1)
    y = jnp.einsum("byxijgc,ijcgn->byxgn", x, w).reshape(*seen.shape[:3], -1)
    y = layers.at.output(f"{path}.kernel", y)
    return y + along_last(layers.p[f"{path}.bias"], y)


def convolved_by_hand(params, args, at):
    layers, (x,) = Layers(at, by_path(params)), args
    x = jax.nn.relu(conv_by_hand(layers, "first", x, (3, 3), (2, 2)))
    return conv_by_hand(layers, "grouped", x, (2, 1), groups=4)


def conv():
    return linen(
        Convolved(),
        Draws()(2, 9, 8, 4),
        by_hand=convolved_by_hand,
        contracted={"first.kernel": (0, 1, 2), "grouped.kernel": (0, 1, 2)},
        dynamic=None,
    )


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(12, D, name="embed")
        return embed.attend(nn.gelu(nn.Dense(D, name="mix")(embed(ids))))


def tied_by_hand(params, args, at):
    layers, (ids,) = Layers(at, by_path(params)), args
    table = layers.p["embed.embedding"]
    x = jax.nn.gelu(layers.dense("mix", table[ids]))
    return layers.product("embed.embedding", x, table.T)


def tied_embedding():
    return linen(
        Tied(),
        Draws().ids(12, 2, 5),
        by_hand=tied_by_hand,
        contracted={"embed.embedding": (1,), "mix.kernel": (0,)},
    )


class Block(nn.Module):
    """One layer of an encoder, as `nn.scan` wants it."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm(name="norm")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS, name="attention")(h)
        return x + MLP(name="mlp")(x), None


def block_by_hand(layers, path, x):
    h = layers.layer_norm(f"{path}norm", x)
    x = x + layers.attention(f"{path}attention.", h, h)
    return x + mlp_by_hand(layers, f"{path}mlp.", x)


class Scanned(nn.Module):
    """Layers stacked along the first axis of every parameter, rematerialized."""

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Block, prevent_cse=False)
        stack = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return stack(name="layers")(x, None)[0]


def scanned_by_hand(params, args, at):
    layers, (x,) = Layers(at, by_path(params)), args
    for i in range(2):
        x = block_by_hand(layers.of("layers.", i), "layers.", x)
    return x


BLOCK = {
    **{f"attention.{path}": axes for path, axes in ATTENTION.items()},
    "mlp.Dense_0.kernel": (0,),
    "mlp.Dense_1.kernel": (0,),
}


def scanned():
    contracted = {f"layers.{k}": tuple(a + 1 for a in v) for k, v in BLOCK.items()}
    return linen(
        Scanned(),
        Draws(2)(2, 5, D),
        by_hand=scanned_by_hand,
        eager=False,
        contracted=contracted,
        stack=dict.fromkeys(contracted, (0,)),
    )


class Vision(nn.Module):
    """Patches of an image, positions, a class token, a layer and a head."""

    @nn.compact
    def __call__(self, image):
        x = nn.Conv(D, (4, 4), strides=(4, 4), padding="VALID", name="patches")(image)
        x = x.reshape(x.shape[0], -1, D)
        token = self.param("token", nn.initializers.normal(0.1), (1, 1, D))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(0.1), (1, x.shape[1], D))
        x, _ = Block(name="block")(x, None)
        return nn.Dense(10, name="head")(x[:, 0])


def vision_by_hand(params, args, at):
    layers, (image,) = Layers(at, by_path(params)), args
    x = conv_by_hand(layers, "patches", image, (4, 4), (4, 4)).reshape(image.shape[0], -1, D)
    token = jnp.broadcast_to(layers.p["token"], (x.shape[0], 1, D))
    x = jnp.concatenate([token, x], 1) + layers.p["positions"]
    x = block_by_hand(layers, "block.", x)
    return layers.dense("head", x[:, 0])


def vision():
    block = {f"block.{k}": v for k, v in BLOCK.items()}
    return linen(
        Vision(),
        Draws()(2, 8, 8, 3),
        by_hand=vision_by_hand,
        eager=False,
        dynamic=None,
        contracted={"patches.kernel": (0, 1, 2), "head.kernel": (0,), **block},
    )


CASES = {
    "linen mlp": mlp,
    "linen self-attention": self_attention,
    "linen cross-attention": cross_attention,
    "linen DenseGeneral": dense_general,
    "linen conv": conv,
    "linen tied embedding": tied_embedding,
    "linen scan and remat": scanned,
    "linen vision transformer": vision,
}
