# SPDX-License-Identifier: Apache-2.0
"""Models that plans are measured on, and the named policies of several libraries for them.

Four models: tunix's Llama-3.2-1B and Qwen3-0.6B cut to four layers, a vision transformer
and a residual network with BatchNorm in plain nnx. JAX's policies have their names;
tunix's levels are rules on its modules; MaxText's presets and torchtitan's list of
operations are translated to the names that the same values have here.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from flax import nnx

import remattools as rt

TARGET = "tpu:v5e:2x2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, its loss and its batch.

    Attributes:
        what: Title on the page.
        build: Creates the abstract model.
        loss: Function of the model and the batch.
        batch: Abstract arrays.
        blocks: Patterns of the blocks.
        matmuls: Names of a block's matrix products, in the program's order, without the two inside attention.
        context: Name of attention's output before its last projection; None without attention.
        halves: Names of attention and MLP in a block.
        roles: MaxText's names mapped to the names here.
    """

    what: str
    build: Callable[[], nnx.Module]
    loss: Callable[..., jax.Array]
    batch: tuple[jax.ShapeDtypeStruct, ...]
    blocks: tuple[str, ...]
    matmuls: tuple[str, ...]
    context: str | None = None
    halves: tuple[str, ...] = ()
    roles: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def policies(subject: Subject) -> dict[str, Any]:
    """Return the policies as rules, by library and name."""

    def everywhere(action: Any) -> dict[str, Any]:
        return dict.fromkeys(subject.blocks, action)

    found: dict[str, Any] = {
        f"JAX {name}": everywhere(name)
        for name in (
            "everything_saveable",
            "nothing_saveable",
            "dots_saveable",
            "dots_with_no_batch_dims_saveable",
        )
    }
    if subject.halves:
        # tunix's other level, DECODER, is nothing_saveable on every block.
        found["tunix BLOCK"] = {f"{b}.{half}": "nothing_saveable" for b in subject.blocks for half in subject.halves}
    if subject.roles:
        for name, saved in _MAXTEXT.items():
            save = tuple(value for role in saved for value in subject.roles[role])
            found[f"MaxText {name}"] = everywhere(rt.Remat(save=save))
    # Every second matrix product, and attention's output.
    listed = (*subject.matmuls[::2], *((subject.context,) if subject.context else ()))
    found["torchtitan per-op list"] = everywhere(rt.Remat(save=listed))
    return found


_QKV = ("query_proj", "key_proj", "value_proj")
_WI = ("mlpwi",)
_MAXTEXT = {
    "minimal_with_context": (*_QKV, "out_proj", *_WI, "mlpwo", "context"),
    "minimal": (*_QKV, "out_proj", *_WI, "mlpwo"),
    "save_dot_with_context_except_mlp": (*_QKV, "context", "out_proj"),
    "save_dot_except_mlpwi": (*_QKV, "out_proj", "mlpwo"),
    "save_dot_except_mlp": (*_QKV, "out_proj"),
    "save_qkv_proj": _QKV,
    "save_out_proj": ("out_proj",),
}


def mean_logsumexp(logits: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1).mean()


def cast_to_bfloat16(model: nnx.Module) -> nnx.Module:
    """Return the model in bfloat16, except for its counters."""

    def cast(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)

    nnx.update(model, jax.tree.map(cast, nnx.state(model)))
    return model


def _language_loss(tokens: int) -> Callable[..., jax.Array]:
    def loss(model: Any, ids: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens)[None]
        mask = jnp.tril(jnp.ones((1, tokens, tokens), jnp.bool_))
        logits, _ = model(ids, positions, None, mask)
        return mean_logsumexp(logits)

    return loss


def decoder(what: str, build: Callable[[], Any], tokens: int, context: str | None = None) -> Subject:
    """Return a decoder with the module names of tunix's Llama and Qwen."""
    projections = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    return Subject(
        what=what,
        build=build,
        loss=_language_loss(tokens),
        batch=(jax.ShapeDtypeStruct((1, tokens), jnp.int32),),
        blocks=("layers.*",),
        matmuls=(*projections, "mlp.down_proj"),
        context=context,
        halves=("attn", "mlp"),
        roles={
            "query_proj": ("attn.q_proj",),
            "key_proj": ("attn.k_proj",),
            "value_proj": ("attn.v_proj",),
            "out_proj": ("attn.o_proj",),
            "mlpwi": ("mlp.gate_proj", "mlp.up_proj"),
            "mlpwo": ("mlp.down_proj",),
            "context": (context,),
        },
    )


def llama() -> Subject:
    from tunix.models.llama3 import model as llama3  # only these two subjects need tunix

    config = dataclasses.replace(llama3.ModelConfig.llama3p2_1b(), num_layers=4)

    def build() -> Any:
        return cast_to_bfloat16(nnx.eval_shape(lambda: llama3.Llama3(config, rngs=nnx.Rngs(0))))

    what = "tunix's Llama-3.2-1B cut to 4 layers, bfloat16, 1 x 4,096 tokens"
    return decoder(what, build, 4096, "attn:reshape[3]")


def qwen() -> Subject:
    from tunix.models.qwen3 import model as qwen3

    config = dataclasses.replace(qwen3.ModelConfig.qwen3_0p6b(), num_layers=2, vocab_size=8192)

    def build() -> Any:
        return cast_to_bfloat16(nnx.eval_shape(lambda: qwen3.Qwen3(config, rngs=nnx.Rngs(0))))

    what = "tunix's Qwen3-0.6B cut to 2 layers and 8,192 words, bfloat16, 1 x 2,048 tokens"
    return decoder(what, build, 2048, "attn:reshape[1]")


class Attention(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.query, self.key, self.value, self.out = (nnx.Linear(width, width, rngs=rngs) for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        def split(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], self.heads, -1)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(x.dtype)
        context = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        return self.out(jax.ad_checkpoint.checkpoint_name(context, "context"))


class Mlp(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x)))


class ViTBlock(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attn, self.mlp = Attention(width, heads, rngs), Mlp(width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nnx.Module):
    def __init__(self, depth: int = 4, width: int = 384, heads: int = 6, patch: int = 16, size: int = 224) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Conv(3, width, (patch, patch), strides=(patch, patch), rngs=rngs)
        self.position = nnx.Param(jnp.zeros((1, (size // patch) ** 2, width)))
        self.layers = nnx.List([ViTBlock(width, heads, rngs) for _ in range(depth)])
        self.norm, self.head = nnx.LayerNorm(width, rngs=rngs), nnx.Linear(width, 1000, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.embed(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.position[...]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(axis=1))


def _image_loss(model: Any, images: jax.Array) -> jax.Array:
    return mean_logsumexp(model(images))


def vit() -> Subject:
    return Subject(
        what="a vision transformer (width 384, 6 heads, 4 blocks), bfloat16, 64 images of 224 x 224",
        build=lambda: cast_to_bfloat16(nnx.eval_shape(ViT)),
        loss=_image_loss,
        batch=(jax.ShapeDtypeStruct((64, 224, 224, 3), jnp.bfloat16),),
        blocks=("layers.*",),
        matmuls=("attn.query", "attn.key", "attn.value", "attn.out", "mlp.up", "mlp.down"),
        context="@context",
        halves=("attn", "mlp"),
        roles={
            "query_proj": ("attn.query",),
            "key_proj": ("attn.key",),
            "value_proj": ("attn.value",),
            "out_proj": ("attn.out",),
            "mlpwi": ("mlp.up",),
            "mlpwo": ("mlp.down",),
            "context": ("@context",),
        },
    )


class ResidualBlock(nnx.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(inputs, outputs, (3, 3), strides=(stride, stride), use_bias=False, rngs=rngs)
        self.conv2 = nnx.Conv(outputs, outputs, (3, 3), use_bias=False, rngs=rngs)
        self.norm1, self.norm2 = nnx.BatchNorm(outputs, rngs=rngs), nnx.BatchNorm(outputs, rngs=rngs)
        self.skip = (
            nnx.Conv(inputs, outputs, (1, 1), strides=(stride, stride), use_bias=False, rngs=rngs)
            if (inputs, stride) != (outputs, 1)
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + (x if self.skip is None else self.skip(x)))


class ResNet(nnx.Module):
    def __init__(self, widths: tuple[int, ...] = (64, 128), depth: int = 2) -> None:
        rngs = nnx.Rngs(0)
        self.stem = nnx.Conv(3, widths[0], (7, 7), strides=(2, 2), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(widths[0], rngs=rngs)
        blocks, before = [], widths[0]
        for stage, width in enumerate(widths):
            for number in range(depth):
                stride = 2 if stage and not number else 1
                blocks.append(ResidualBlock(before, width, stride, rngs))
                before = width
        self.layers, self.head = nnx.List(blocks), nnx.Linear(before, 1000, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.stem(images)))
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(axis=(1, 2)))


def resnet() -> Subject:
    return Subject(
        what="a residual network with BatchNorm (two stages of two blocks), bfloat16, 64 images of 64 x 64",
        build=lambda: cast_to_bfloat16(nnx.eval_shape(ResNet)),
        loss=_image_loss,
        batch=(jax.ShapeDtypeStruct((64, 64, 64, 3), jnp.bfloat16),),
        blocks=("layers.*",),
        matmuls=("conv1", "conv2"),
    )


SUBJECTS = {"llama": llama, "qwen": qwen, "vit": vit, "resnet": resnet}
