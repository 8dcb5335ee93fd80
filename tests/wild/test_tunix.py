# SPDX-License-Identifier: Apache-2.0
"""google-tunix: language models with caches, vision and mixtures of experts, from the package index, unedited."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tunix.models.gemma import model as gemma
from tunix.models.gemma3 import model as gemma3
from tunix.models.gemma3 import vision
from tunix.models.gemma4 import model as gemma4
from tunix.models.llama3 import model as llama3
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen3 import model as qwen3

import remattools as rt
from tests.remattools.exactness import assert_same_values
from tests.wild.checks import Subject, check, train

pytestmark = pytest.mark.wild

BATCH, SEQ, VOCABULARY, LAYERS = 2, 6, 32, 2


def forward(model: Any, tokens: Any, mask: Any, **more: Any) -> Any:
    """Training: the whole sequence at once, no cache."""
    positions = jnp.broadcast_to(jnp.arange(SEQ), (BATCH, SEQ))
    return model(tokens, positions, None, mask, **more)


def decode(model: Any, tokens: Any, mask: Any, **more: Any) -> Any:
    """Inference: a prompt of three tokens, then token by token, with a KV cache."""
    del mask, more
    cache = make_cache(model)
    outputs = []
    for start, stop in [(0, 3), *((i, i + 1) for i in range(3, SEQ))]:
        positions = jnp.broadcast_to(jnp.arange(start, stop), (BATCH, stop - start))
        mask = jnp.broadcast_to(positions[:, :, None] >= jnp.arange(SEQ), (BATCH, stop - start, SEQ))
        logits, cache = model(tokens[:, start:stop], positions, cache, mask)
        outputs.append(logits)
    return outputs, cache


def make_cache(model: Any) -> Any:
    if hasattr(model, "init_cache"):
        return model.init_cache(BATCH, SEQ, jnp.float32)
    config = model.config
    shape = (BATCH, SEQ, config.num_kv_heads, config.head_dim)
    return {
        f"layer_{i}": {"k": jnp.zeros(shape), "v": jnp.zeros(shape), "end_index": jnp.zeros(BATCH, jnp.int32)}
        for i in range(config.num_layers)
    }


SIZES = {"num_layers": LAYERS, "embed_dim": 8, "hidden_dim": 16, "num_heads": 4, "head_dim": 4, "num_kv_heads": 2}
QWEN = {**SIZES, "vocab_size": VOCABULARY, "rope_theta": 10_000, "norm_eps": 1e-6}
# Twice as many: a layer uses keys and values of an earlier one of its kind.
GEMMA4 = {
    **SIZES,
    "num_layers": 2 * LAYERS,
    "num_embed": VOCABULARY,
    "sliding_window_size": SEQ,
    "num_global_kv_heads": 1,
    "global_key_size": 4,
}

MODELS = {
    "llama3": (llama3.Llama3, llama3.ModelConfig(**QWEN)),
    "llama3-tied": (llama3.Llama3, llama3.ModelConfig(**QWEN, weight_tying=True)),
    "qwen2": (qwen2.Qwen2, qwen2.ModelConfig(**QWEN, use_tied_embedding=True)),
    "qwen3": (qwen3.Qwen3, qwen3.ModelConfig(**QWEN)),
    "qwen3-moe": (qwen3.Qwen3, qwen3.ModelConfig(**QWEN, num_experts=4, num_experts_per_tok=2)),
    "gemma": (
        gemma.Gemma,
        gemma.ModelConfig(
            **{**SIZES, "num_kv_heads": 1},
            num_embed=VOCABULARY,
            final_logit_softcap=None,
            attention_types=(gemma.AttentionType.GLOBAL,) * LAYERS,
            use_post_attn_norm=False,
            use_post_ffw_norm=False,
        ),
    ),
    "gemma2": (
        gemma.Gemma,
        gemma.ModelConfig(
            **SIZES,
            num_embed=VOCABULARY,
            final_logit_softcap=30.0,
            attention_types=[gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL],
            use_post_attn_norm=True,
            use_post_ffw_norm=True,
            attn_logits_soft_cap=50.0,
            sliding_window_size=3,
        ),
    ),
    "gemma3": (
        gemma3.Gemma3,
        gemma3.ModelConfig(**SIZES, num_embed=VOCABULARY, sliding_window_size=3, param_dtype=jnp.float32),
    ),
    "gemma4": (
        gemma4.Gemma4,
        gemma4.ModelConfig(
            **GEMMA4,
            per_layer_input_dim=4,
            frac_shared_layers=0.5,
            override_kv_shared_ffw_hidden=24,
            attention_pattern=(gemma4.AttentionType.LOCAL_SLIDING, gemma4.AttentionType.GLOBAL),
        ),
    ),
    "gemma4-moe": (
        gemma4.Gemma4,
        gemma4.ModelConfig(
            **GEMMA4,
            k_eq_v_global=True,
            enable_moe=True,
            num_experts=4,
            num_experts_per_tok=2,
            expert_dim=8,
            moe_dense_hidden_dim=16,
            attention_pattern=(gemma4.AttentionType.LOCAL_SLIDING, gemma4.AttentionType.GLOBAL),
        ),
    ),
}


def build(cls: Any, config: Any) -> Any:
    return cls(config, rngs=nnx.Rngs(0))


@functools.cache
def subject(name: str, *, remat: str = "NONE") -> Subject:
    cls, config = MODELS[name]
    level = type(config.remat_config)[remat]
    tokens = jax.random.randint(jax.random.key(1), (BATCH, SEQ), 0, VOCABULARY)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((SEQ, SEQ), bool)), (BATCH, SEQ, SEQ))
    return Subject(
        make=functools.partial(build, cls, dataclasses.replace(config, remat_config=level)),
        inputs={"tokens": tokens, "mask": mask},
        use=forward,
        infer=decode,
    )


RULES = {
    "every-layer": ({"layers.*": "nothing_saveable"}, 1),
    "attention": ({"attn": "nothing_saveable"}, 1),
    "every-second": ({"layers.*": rt.Remat(every_n=2)}, 2),
    "names": ({"layers.*": rt.Remat(save=("attn", "attn:dot_general"))}, 1),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_family(name: str, rule: str) -> None:
    rules, every = RULES[rule]
    check(subject(name), rules, MODELS[name][1].num_layers // every)


@pytest.mark.parametrize(("level", "rule"), [("DECODER", "every-layer"), ("BLOCK", "attention")])
@pytest.mark.parametrize("name", ["llama3", "gemma4"])
def test_same_as_the_librarys_own_setting(name: str, level: str, rule: str) -> None:
    own = subject(name, remat=level)
    ruled = rt.apply(subject(name).model(), RULES[rule][0])
    assert_same_values(train(own, own.model()), train(subject(name), ruled))


def mean_logsumexp(model: Any, tokens: Any, mask: Any) -> Any:
    return jnp.mean(jax.nn.logsumexp(forward(model, tokens, mask)[0], axis=-1))


@pytest.mark.parametrize("level", ["DECODER", "BLOCK"])
@pytest.mark.parametrize("name", MODELS)
def test_same_program_as_the_librarys_own_setting(name: str, level: str) -> None:
    """The compiler's memory and flops of tunix's own remat and of a rule on its unedited model are equal."""
    # BLOCK is attention and dense MLP; the mixture of qwen3 is left as it is.
    blocks = ["attn"] if name == "qwen3-moe" else ["attn", "mlp"]
    rules = dict.fromkeys(["layers.*"] if level == "DECODER" else blocks, "nothing_saveable")
    own, plain = subject(name, remat=level), subject(name)

    def figures(model: Any) -> tuple[int, float]:
        measured = rt.measure(mean_logsumexp, model, own.inputs["tokens"], own.inputs["mask"], differentiate=True)
        return measured.temp_bytes, measured.flops

    ruled = figures(rt.apply(plain.model(), rules))
    assert ruled == figures(own.model())
    assert ruled != figures(plain.model())  # control


def with_images(model: Any, tokens: Any, mask: Any, images: Any) -> Any:
    positions = jnp.broadcast_to(jnp.arange(SEQ), (BATCH, SEQ))
    # The language model stops the gradient at the encoder; the encoder's own output is trained here too.
    return model(tokens, positions, None, mask, images=images[:, None]), model.vision_encoder.siglip_encoder(images)


def test_vision_encoder_inside_a_language_model() -> None:
    cls, config = MODELS["gemma3"]
    encoder = vision.SigLIPConfig(
        num_mm_tokens_per_image_prepool=4,
        num_mm_tokens_per_image=1,
        image_height=8,
        image_width=8,
        soft_token_placeholder=5,
        patch_size=(4, 4),
        width=8,
        depth=2,
        mlp_dim=16,
        num_heads=2,
    )
    seeing = dataclasses.replace(
        subject("gemma3"),
        make=functools.partial(build, cls, dataclasses.replace(config, vision_config=encoder)),
        inputs={
            "tokens": jnp.array([[1, 5, 2, 3, 4, 6], [5, 1, 2, 3, 4, 6]]),
            "mask": subject("gemma3").inputs["mask"],
            "images": jax.random.normal(jax.random.key(2), (BATCH, 8, 8, 3)),
        },
        use=with_images,
        infer=None,
    )
    rules = {"layers.*": "nothing_saveable", "vision_encoder.**.blocks.*": "dots_saveable"}
    # The encoder runs twice, inside the language model and alone.
    check(seeing, rules, LAYERS + 2 * encoder.depth)
