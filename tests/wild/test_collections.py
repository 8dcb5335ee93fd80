# SPDX-License-Identifier: Apache-2.0
"""Other collections from the package index: state-space, vision, graphs, adapters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import canvit_core.backbone
import canvit_core.config
import canvit_nnx
import jax
import jax.numpy as jnp
import mamba2_jax
import mamba3_jax
import pytest
import qwix
from flax import nnx
from jraphx.nn.models import GAT

from tests.wild import test_tunix
from tests.wild.checks import Subject, check

pytestmark = pytest.mark.wild

MAMBA = {"vocab_size": 16, "hidden_size": 8, "state_size": 4, "head_dim": 4, "chunk_size": 4, "num_hidden_layers": 2}
TOKENS = jnp.arange(16).reshape(2, 8)


def labelled(model: Any, tokens: Any) -> Any:
    return model(tokens, labels=tokens)


def mamba2() -> Subject:
    config = mamba2_jax.Mamba2Config(**MAMBA)

    def decode(model: Any, tokens: Any) -> Any:
        cache, logits = mamba2_jax.create_empty_cache(config, 2), []
        for position in range(4):
            out = model(tokens[:, position : position + 1], cache=cache)
            cache = out["cache"]
            logits.append(out["logits"])
        return logits

    return Subject(
        make=lambda: mamba2_jax.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)),
        inputs={"tokens": TOKENS},
        use=labelled,
        infer=decode,
    )


def mamba3() -> Subject:
    config = mamba3_jax.Mamba3Config(**MAMBA, is_mimo=True, mimo_rank=2)
    return Subject(
        make=lambda: mamba3_jax.Mamba3ForCausalLM(config, rngs=nnx.Rngs(0)), inputs={"tokens": TOKENS}, use=labelled
    )


def graph_attention() -> Subject:
    """Dropout, and a graph as index arrays."""
    edges = jnp.array([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])
    return Subject(
        make=lambda: GAT(4, 8, 2, 3, heads=2, dropout_rate=0.1, rngs=nnx.Rngs(0)),
        inputs={"x": jax.random.normal(jax.random.key(0), (4, 4))},
        use=lambda model, x: model(x, edges),
    )


def adapters() -> Subject:
    """A root whose class another library swapped, with new parameters in every projection."""
    base = test_tunix.subject("llama3")

    def make() -> Any:
        model = base.make()
        provider = qwix.LoraProvider(module_path=".*(q_proj|v_proj|up_proj)", rank=2, alpha=2.0)
        return qwix.apply_lora_to_model(model, provider, **model.get_model_input(), rngs=nnx.Rngs(1))

    return dataclasses.replace(base, make=make, infer=None)


@functools.cache
def small_spec() -> str:
    """A name under which the library finds a small backbone: it offers large ones only."""
    name = next(iter(canvit_core.config.BACKBONES))
    canvit_core.config.BACKBONES[name] = canvit_core.backbone.ViTSpec(
        embed_dim=16, num_heads=2, num_blocks=4, patch_size=8
    )
    return str(name)


def recurrent_vision() -> Subject:
    """Named tuples in and out, keyword-only arguments, a state handed from step to step."""
    config = canvit_nnx.CanViTConfig(
        backbone_name=small_spec(),
        canvas_num_heads=2,
        canvas_head_dim=8,
        num_canvas_registers=2,
        num_backbone_registers=1,
    )

    def glimpses(model: Any, image: Any) -> Any:
        state, outputs = model.init_state(batch_size=2, canvas_grid_size=2), []
        for _ in range(2):
            out = model(glimpse=image, state=state, viewpoint=canvit_nnx.Viewpoint.full_scene(batch_size=2))
            state = out.state
            outputs.append(out)
        return outputs

    return Subject(
        make=lambda: canvit_nnx.CanViT(config, rngs=nnx.Rngs(0)),
        inputs={"image": jax.random.normal(jax.random.key(0), (2, 16, 16, 3))},
        use=glimpses,
    )


@pytest.mark.parametrize(
    ("make", "pattern", "expected"),
    [
        pytest.param(mamba2, "backbone.layers.*", 2, id="mamba2"),
        pytest.param(mamba3, "backbone.layers.*", 2, id="mamba3"),
        pytest.param(graph_attention, "convs.*", 2, id="graph-attention"),
        pytest.param(adapters, "layers.*", 2, id="adapters"),
        pytest.param(recurrent_vision, "backbone.blocks.*", 8, id="recurrent-vision"),
    ],
)
def test_collection(make: Callable[[], Subject], pattern: str, expected: int) -> None:
    check(make(), {pattern: "nothing_saveable"}, expected)
