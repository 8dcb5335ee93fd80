# SPDX-License-Identifier: Apache-2.0
"""Each preset on the architecture that it is for, and weights loaded before or after it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from tunix.models import safetensors_loader
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params

import remattools as rt
from tests.wild.checks import check, regions
from tests.wild.test_tunix import MODELS, subject

pytestmark = pytest.mark.wild


def test_every_preset_has_its_model():
    assert set(rt.Rules.presets()) <= set(MODELS)


@pytest.mark.parametrize("name", rt.Rules.presets())
def test_a_preset_fits_its_architecture(name):
    check(subject(name), rt.Rules.preset(name), MODELS[name][1].num_layers)


def weights_of(config, rng):
    """A checkpoint in the names and shapes of the published ones, of random numbers."""

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    width, head = config.embed_dim, config.head_dim
    found = {
        "model.embed_tokens.weight": normal(config.vocab_size, width),
        "model.norm.weight": normal(width),
        "lm_head.weight": normal(config.vocab_size, width),
    }
    for number in range(config.num_layers):
        layer = f"model.layers.{number}."
        found |= {
            f"{layer}self_attn.q_proj.weight": normal(config.num_heads * head, width),
            f"{layer}self_attn.k_proj.weight": normal(config.num_kv_heads * head, width),
            f"{layer}self_attn.v_proj.weight": normal(config.num_kv_heads * head, width),
            f"{layer}self_attn.o_proj.weight": normal(width, config.num_heads * head),
            f"{layer}mlp.gate_proj.weight": normal(config.hidden_dim, width),
            f"{layer}mlp.up_proj.weight": normal(config.hidden_dim, width),
            f"{layer}mlp.down_proj.weight": normal(width, config.hidden_dim),
            f"{layer}input_layernorm.weight": normal(width),
            f"{layer}post_attention_layernorm.weight": normal(width),
        }
    return found


@rt.remat(rules=rt.Rules.preset("llama3"))
class Ruled(llama3.Llama3):
    """Has its rules from the moment that it is made, so that the loader fills a ruled model."""


@pytest.mark.parametrize("mode", ["optimized", "original"])
def test_weights_loaded_before_or_after_a_preset_are_the_same(tmp_path, mode):
    """By tunix's own loader, from a file of its own format."""
    config = MODELS["llama3"][1]
    weights = weights_of(config, np.random.default_rng(0))
    save_file(weights, tmp_path / "model.safetensors")

    def load(cls):
        mapping = params._get_key_and_transform_mapping
        return safetensors_loader.load_and_create_model(
            str(tmp_path), cls, config, mapping, dtype=jnp.float32, mode=mode
        )

    plain, after = load(llama3.Llama3), load(Ruled)
    before = rt.apply(load(llama3.Llama3), rt.Rules.preset("llama3"))
    embedded = weights["model.embed_tokens.weight"]
    assert any(np.array_equal(leaf, embedded) for leaf in jax.tree.leaves(nnx.state(plain))), "control"
    assert regions(subject("llama3"), plain) == 0, "control"
    assert regions(subject("llama3"), before) == regions(subject("llama3"), after) == config.num_layers
    states = [nnx.to_pure_dict(nnx.state(model)) for model in (plain, before, after)]
    for other in states[1:]:
        assert jax.tree.structure(other) == jax.tree.structure(states[0])
        jax.tree.map(np.testing.assert_array_equal, other, states[0])
    outputs = [subject("llama3").use(model, **subject("llama3").inputs)[0] for model in (before, after)]
    np.testing.assert_array_equal(*outputs)
