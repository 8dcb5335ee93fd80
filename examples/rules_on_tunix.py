# SPDX-License-Identifier: Apache-2.0
"""Apply a rule file of six lines to a published architecture: tunix's Llama 3, unedited.

pip install google-tunix                     # or the parts that `make test-wild` installs
python examples/rules_on_tunix.py
"""

import pathlib

import jax
import jax.numpy as jnp
from flax import nnx
from tunix.models.llama3 import model as llama3

import remattools as rt

RULES = pathlib.Path(__file__).with_name("llama3.toml")
BATCH, LENGTH = 2, 256


def make_model() -> llama3.Llama3:
    config = llama3.ModelConfig(
        num_layers=6, vocab_size=512, embed_dim=128, hidden_dim=512, num_heads=8, head_dim=16, num_kv_heads=4,
        norm_eps=1e-5, rope_theta=500_000,
    )  # fmt: skip
    return llama3.Llama3(config, rngs=nnx.Rngs(0))


def loss(model: llama3.Llama3, tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (BATCH, LENGTH, LENGTH))
    logits, _ = model(tokens, positions, None, mask)
    return -jnp.mean(jax.nn.log_softmax(logits[:, :-1])[..., 0])


def main() -> None:
    model = make_model()
    tokens = jax.random.randint(jax.random.key(0), (BATCH, LENGTH), 0, 512)
    print(rt.explain(model, rt.Rules.load(RULES)))
    table = rt.compare(
        loss, model, tokens, differentiate=True, candidates={"none": None, RULES.name: rt.Rules.load(RULES)}
    )
    print(table)

    plain = nnx.jit(nnx.value_and_grad(loss))(model, tokens)
    ruled = nnx.jit(nnx.value_and_grad(loss))(rt.apply(model, RULES), tokens)
    for actual, expected in zip(jax.tree.leaves(ruled), jax.tree.leaves(plain), strict=True):
        assert jnp.allclose(actual, expected, rtol=1e-4, atol=1e-4 * float(jnp.abs(expected).max()))
    print("loss and gradients agree with the plain model")


if __name__ == "__main__":
    main()
