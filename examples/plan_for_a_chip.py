# SPDX-License-Identifier: Apache-2.0
"""Plan for a chip that you do not own: its compiler runs on your machine and needs no weights.

pip install "nnx-checkpointing[tpu]"
python examples/plan_for_a_chip.py --target tpu:v5e:2x2 --budget 0.6
python examples/plan_for_a_chip.py --target cpu          # the same with the CPU compiler
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

import remattools as rt


class Block(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.silu(self.up(x)))


class Model(nnx.Module):
    def __init__(self, *, depth: int = 4, width: int = 128, rngs: nnx.Rngs):
        self.layers = nnx.List(Block(width, rngs=rngs) for _ in range(depth))

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


def loss(model: Model, x: jax.Array) -> jax.Array:
    return jnp.mean(model(x) ** 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="tpu:v5e:2x2")
    parser.add_argument("--budget", type=float, default=0.6, help="fraction of the plain model's temporaries")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("chip_rules.toml"))
    args = parser.parse_args()

    model = nnx.eval_shape(lambda: Model(rngs=nnx.Rngs(0)))
    batch = jax.ShapeDtypeStruct((8, 128, 128), jnp.float32)
    plan = rt.plan(loss, model, batch, budget=args.budget, of="temp", target=args.target, max_compiles=4)
    print(plan)
    args.out.write_text(plan.to_toml())
    print(f"rules written to {args.out}: rt.apply(model, {str(args.out)!r})")


if __name__ == "__main__":
    main()
