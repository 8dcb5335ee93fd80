# SPDX-License-Identifier: Apache-2.0
"""The list of changes; `changes` explains how they are tried."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tests.ckpttools.surgery.changes import (
    Change,
    Leaves,
    Net,
    Origin,
    State,
    adam_of,
    array,
    block,
    block_of,
    fresh_where,
    linear,
    renamed,
    same,
    scanned,
    sequence,
    stacked_from,
    torch_linear,
    tower,
    trained,
    unstacked_from,
)

OPT = "optimizer.opt_state"


def list_changes() -> list[Change]:
    """Return all changes."""
    return [
        *_list_optimizers(),
        *_list_layers(),
        *_list_names(),
        *_list_sizes(),
        *_list_forms(),
        *_list_parts(),
        *_list_ambiguous(),
    ]


def _count_of(origin: Origin) -> Origin:
    """Let counters that the disk does not have count as the one that it has."""

    def follow(name: str, old: Leaves) -> Any:
        found = origin(name, old)
        counts = [each for each in old if each.endswith(".count") and "rngs" not in each]
        return counts[0] if found is None and counts and name.endswith(".count") else found

    return follow


def _list_optimizers() -> Iterator[Change]:
    adam, clip, schedule = optax.adam(1e-3), optax.clip_by_global_norm(1.0), optax.cosine_decay_schedule(1e-3, 100)
    momentum = optax.sgd(1e-3, momentum=0.9)
    decay_mask = optax.adamw(1e-3, mask=lambda params: jax.tree.map(lambda each: each.ndim > 1, params))
    injected = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
    injected_momentum = optax.inject_hyperparams(optax.sgd)(learning_rate=1e-3, momentum=0.9)
    labels = {"first": "a", "second": "b"}
    in_two = optax.multi_transform({"a": adam, "b": optax.sgd(1e-3)}, lambda params: _label(params, labels))

    def to(name: str, old: Any, new: Any, *pairs: tuple[str, str], fresh: tuple[str, ...] = ()) -> Change:
        follow = _count_of(renamed(*pairs))
        return Change(name, trained(old), trained(new), fresh_where(*fresh, otherwise=follow) if fresh else follow)

    yield to("adam, another rate", adam, optax.adam(5e-4))
    yield to("adam, clipping added", adam, optax.chain(clip, adam), (f"{OPT}.1.0.", f"{OPT}.0."))
    yield to("adam, clipping removed", optax.chain(clip, adam), adam, (f"{OPT}.0.", f"{OPT}.1.0."))
    yield to("adam, schedule added", adam, optax.adam(schedule))
    yield to("adam, schedule removed", optax.adam(schedule), adam)
    yield to("adam to adamw", adam, optax.adamw(1e-3))
    yield to("adamw to adam", optax.adamw(1e-3), adam)
    yield to("adamw, decay mask added", optax.adamw(1e-3), decay_mask)
    yield to("adam in a chain of one", adam, optax.chain(adam), (f"{OPT}.0.0.", f"{OPT}.0."))
    yield to(
        "adam to clip, adamw, schedule", adam, optax.chain(clip, optax.adamw(schedule)), (f"{OPT}.1.0.", f"{OPT}.0.")
    )
    yield to("clip, adam to clip, adam, schedule", optax.chain(clip, adam), optax.chain(clip, optax.adam(schedule)))
    yield to(
        "clip, adam, schedule to adam, schedule",
        optax.chain(clip, optax.adam(schedule)),
        optax.adam(schedule),
        (f"{OPT}.0.", f"{OPT}.1.0."),
        (f"{OPT}.1.count", f"{OPT}.1.1.count"),
    )
    yield to("adam, inject_hyperparams added", adam, injected, (f"{OPT}.inner_state.", f"{OPT}."))
    yield to("adam, inject_hyperparams removed", injected, adam, (f"{OPT}.0.", f"{OPT}.inner_state.0."))
    yield to(
        "momentum, inject_hyperparams added",
        momentum,
        injected_momentum,
        (f"{OPT}.inner_state.", f"{OPT}."),
        fresh=(f"{OPT}.count", "hyperparams"),
    )
    yield to("adam, MultiSteps added", adam, optax.MultiSteps(adam, 4), (f"{OPT}.inner_opt_state.", f"{OPT}."))
    yield to("adam, MultiSteps removed", optax.MultiSteps(adam, 4), adam, (f"{OPT}.", f"{OPT}.inner_opt_state."))
    yield to(
        "clip, adam to MultiSteps of it",
        optax.chain(clip, adam),
        optax.MultiSteps(optax.chain(clip, adam), 4),
        (f"{OPT}.inner_opt_state.", f"{OPT}."),
    )
    yield to("adam, apply_if_finite added", adam, optax.apply_if_finite(adam, 5), (f"{OPT}.inner_state.", f"{OPT}."))
    yield to("adam, zero_nans added", adam, optax.chain(optax.zero_nans(), adam), (f"{OPT}.1.0.", f"{OPT}.0."))
    yield to("momentum, clipping added", momentum, optax.chain(clip, momentum), (f"{OPT}.1.0.", f"{OPT}.0."))
    yield to(
        "momentum, decay added in front",
        momentum,
        optax.chain(optax.add_decayed_weights(1e-2), momentum),
        (f"{OPT}.1.0.", f"{OPT}.0."),
    )
    yield to("adam to plain sgd", adam, optax.sgd(1e-3))
    yield to("plain sgd to adam", optax.sgd(1e-3), adam)
    yield to("adam to momentum", adam, momentum, fresh=("trace",))
    yield to("adam to lion", adam, optax.lion(1e-3))
    yield to("adam to amsgrad", adam, optax.amsgrad(1e-3))
    yield to("adam, only on one part", adam, in_two, (f"{OPT}.inner_states.a.inner_state.", f"{OPT}."))
    yield to(
        "adam, average of updates added",
        adam,
        optax.chain(adam, optax.ema(0.9)),
        (f"{OPT}.0.0.", f"{OPT}.0."),
        fresh=("ema",),
    )
    raw = lambda tx: lambda: {"params": block(), "opt": tx.init(block())}  # noqa: E731
    yield Change(
        "plain optax state, clipping added", raw(adam), raw(optax.chain(clip, adam)), renamed(("opt.1.0.", "opt.0."))
    )


def _label(params: Any, labels: dict[str, str]) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: next(
            (labels[str(getattr(key, "key", key))] for key in path if str(getattr(key, "key", key)) in labels), "b"
        ),
        params,
    )


def _list_layers() -> Iterator[Change]:
    one = lambda make, *args: lambda: {"model": make(*args)}  # noqa: E731
    yield Change("scan on", one(tower), one(scanned), stacked_from("layers", "layers"))
    yield Change("scan off", one(scanned), one(tower), unstacked_from("layers", "layers"))
    yield Change(
        "scan on, with adam", lambda: adam_of(tower()), lambda: adam_of(scanned()), stacked_from("layers", "layers")
    )
    yield Change(
        "scan off, with adam", lambda: adam_of(scanned()), lambda: adam_of(tower()), unstacked_from("layers", "layers")
    )
    yield Change(
        "scan on, renamed", one(tower, 3, "blocks"), one(scanned, 3, "layers"), stacked_from("blocks", "layers")
    )

    def torch_tower() -> State:
        return {
            "model": {
                "h": {
                    str(n): {"up": torch_linear(4, 8), "down": torch_linear(8, 4), "mix": torch_linear(4, 4)}
                    for n in range(3)
                }
            }
        }

    def flax_tower() -> State:
        return {
            "model": {"h": {str(n): {"up": linear(4, 8), "down": linear(8, 4), "mix": linear(4, 4)} for n in range(3)}}
        }

    def flax_scan() -> State:
        return {"model": {"h": jax.tree.map(lambda *each: jnp.stack(each), *flax_tower()["model"]["h"].values())}}

    def turned(name: str, old: Leaves) -> Any:
        before = name.replace("kernel", "weight")
        return old[before].T if "kernel" in name else same(name, old)

    yield Change("PyTorch's weights to kernels", torch_tower, flax_tower, turned)
    yield Change(
        "PyTorch's weights to a scan",
        torch_tower,
        flax_scan,
        stacked_from("h", "h", transposed=True, names=(("kernel", "weight"),)),
    )
    yield Change(
        "experts stacked",
        one(lambda: {"moe": {"experts": {str(n): linear(4, 8) for n in range(4)}}}),
        one(lambda: {"moe": {"experts": jax.tree.map(lambda *e: jnp.stack(e), *[linear(4, 8)] * 4)}}),
        stacked_from("experts", "experts"),
    )
    yield Change(
        "dropout in, between layers",
        sequence((4, 8), (8, 8), (8, 2)),
        sequence((4, 8), "drop", (8, 8), "drop", (8, 2)),
        renamed(("layers.2.kernel", "layers.1.kernel"), ("layers.2.bias", "layers.1.bias"), ("layers.4.", "layers.2.")),
    )
    yield Change(
        "dropout out, between layers",
        sequence((4, 8), "drop", (8, 8), "drop", (8, 2)),
        sequence((4, 8), (8, 8), (8, 2)),
        renamed(("layers.2.", "layers.4."), ("layers.1.", "layers.2.")),
    )
    yield Change(
        "dropout in, between equal layers",
        sequence((4, 4), (4, 4), (4, 4)),
        sequence((4, 4), "drop", (4, 4), "drop", (4, 4)),
        renamed(("layers.2.kernel", "layers.1.kernel"), ("layers.2.bias", "layers.1.bias"), ("layers.4.", "layers.2.")),
    )
    yield Change(
        "a layer inserted in front",
        sequence((4, 8), (8, 2)),
        sequence((3, 4), (4, 8), (8, 2)),
        renamed(("layers.0.", "none."), ("layers.1.", "layers.0."), ("layers.2.", "layers.1.")),
    )
    yield Change("deeper", one(tower, 3), one(tower, 5), same)
    yield Change("less deep", one(tower, 5), one(tower, 3), same)

    class WithDropout(Net):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(5))

    adam = optax.adam(1e-3)
    yield Change("dropout in, as an attribute", trained(adam), trained(adam, WithDropout), same)
    yield Change("dropout out, an attribute", trained(adam, WithDropout), trained(adam), same)


def _list_names() -> Iterator[Change]:
    one = lambda make, *args: lambda: {"model": make(*args)}  # noqa: E731
    yield Change("an item renamed", lambda: {"params": tower()}, one(tower), renamed(("model.", "params.")))
    yield Change(
        "two items renamed",
        lambda: {"params": tower(), "opt": optax.adam(1e-3).init(tower())},
        lambda: {"model": tower(), "optimizer": optax.adam(1e-3).init(tower())},
        renamed(("model.", "params."), ("optimizer.", "opt.")),
    )
    yield Change(
        "a part renamed, with adam",
        lambda: adam_of(tower(3, "blocks")),
        lambda: adam_of(tower(3, "layers")),
        renamed((".layers.", ".blocks.")),
    )
    rename_in = lambda old, new, tree: _rename_keys(tree, {old: new})  # noqa: E731
    yield Change(
        "a part of each block renamed",
        one(tower),
        lambda: {"model": rename_in("attn", "attention", tower())},
        renamed((".attention.", ".attn.")),
    )
    yield Change(
        "a part and what is below it",
        one(tower, 3, "blocks"),
        lambda: {"model": rename_in("attn", "attention", tower())},
        renamed((".attention.", ".attn."), (".layers.", ".blocks.")),
    )
    yield Change(
        "leaves renamed",
        one(tower),
        lambda: {"model": rename_in("scale", "weight", tower())},
        renamed((".weight", ".scale")),
    )

    def linen() -> State:
        return {
            "model": {
                "params": {
                    "Dense_0": linear(3, 5),
                    "Dense_1": linear(5, 2),
                    "BatchNorm_0": {"scale": array(5), "bias": array(5)},
                },
                "batch_stats": {"BatchNorm_0": {"mean": array(5), "var": array(5)}},
            }
        }

    def as_nnx() -> State:
        return {
            "model": {
                "linear1": linear(3, 5),
                "linear2": linear(5, 2),
                "bn": {"scale": array(5), "bias": array(5), "mean": array(5), "var": array(5)},
            }
        }

    def from_linen(name: str, old: Leaves) -> Any:
        part = "batch_stats" if name.rpartition(".")[2] in ("mean", "var") else "params"
        for new, before in (("linear1", "Dense_0"), ("linear2", "Dense_1"), ("bn", "BatchNorm_0")):
            name = name.replace(f"model.{new}.", f"model.{part}.{before}.")
        return same(name, old)

    yield Change("linen's dicts to nnx", linen, as_nnx, from_linen)
    yield Change(
        "linen's params to nnx",
        lambda: {"params": {"params": {"Dense_0": linear(3, 5), "Dense_1": linear(5, 2)}}},
        one(lambda: {"Dense_0": linear(3, 5), "Dense_1": linear(5, 2)}),
        renamed(("model.", "params.params.")),
    )
    yield Change(
        "a list to a dict",
        one(tower),
        lambda: {"model": {**tower(), "layers": {f"layer_{n}": block() for n in range(3)}}},
        renamed((".layers.layer_", ".layers.")),
    )
    yield Change(
        "numbered names to a list",
        one(lambda: {f"layer{n}": block() for n in range(3)}),
        one(lambda: {"layers": {str(n): block() for n in range(3)}}),
        renamed(("model.layers.", "model.layer")),
    )
    yield Change(
        "flattened to nested",
        one(lambda: {"a/up/kernel": array(3, 4), "a/up/bias": array(4), "a/down/kernel": array(4, 3)}),
        one(lambda: {"a": {"up": linear(3, 4), "down": {"kernel": array(4, 3)}}}),
        lambda name, old: "model." + name[6:].replace(".", "/"),
    )
    yield Change(
        "nested to flattened",
        one(lambda: {"a": {"up": linear(3, 4), "down": {"kernel": array(4, 3)}}}),
        one(lambda: {"a_up_kernel": array(3, 4), "a_up_bias": array(4), "a_down_kernel": array(4, 3)}),
        lambda name, old: "model." + name[6:].replace("_", "."),
    )
    yield Change(
        "wrapped, with a new head",
        one(tower),
        one(lambda: {"backbone": tower(), "value": linear(4, 1)}),
        fresh_where("value", otherwise=renamed(("model.backbone.", "model."))),
    )
    yield Change(
        "unwrapped",
        one(lambda: {"backbone": tower(), "value": linear(4, 1)}),
        one(tower),
        renamed(("model.", "model.backbone.")),
    )
    yield Change(
        "moved to another parent",
        one(lambda: {"a": {"norm": {"scale": array(5)}, "up": linear(3, 5)}, "b": {"down": linear(5, 3)}}),
        one(lambda: {"a": {"up": linear(3, 5)}, "b": {"norm": {"scale": array(5)}, "down": linear(5, 3)}}),
        renamed(("b.norm", "a.norm")),
    )


def _rename_keys(tree: Any, names: dict[str, str]) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {names.get(key, key): _rename_keys(each, names) for key, each in tree.items()}


def _list_sizes() -> Iterator[Change]:
    one = lambda make, *args: lambda: {"model": make(*args)}  # noqa: E731

    def words(count: int) -> State:
        return {**tower(), "embed": {"embedding": array(count, 4)}}

    def classes(count: int) -> State:
        return {**tower(), "head": linear(4, count)}

    yield Change("a larger vocabulary", one(words, 11), one(words, 15), block_of(one(words, 15), "embedding"))
    yield Change("a smaller vocabulary", one(words, 11), one(words, 9), block_of(one(words, 9), "embedding"))
    with_adam = lambda: adam_of(words(15))  # noqa: E731
    yield Change(
        "a larger vocabulary, with adam", lambda: adam_of(words(11)), with_adam, block_of(with_adam, "embedding")
    )
    yield Change("a larger head", one(classes, 6), one(classes, 9), block_of(one(classes, 9), "head"))
    yield Change("a smaller head", one(classes, 6), one(classes, 3), block_of(one(classes, 3), "head"))
    renamed_words = lambda: {"net": words(15)}  # noqa: E731
    yield Change("renamed, and a larger vocabulary", one(words, 11), renamed_words, _resized_and_renamed(renamed_words))
    positions = lambda count: lambda: {"model": {**tower(), "pos": array(count, 4)}}  # noqa: E731
    yield Change("longer positions", positions(16), positions(32), block_of(positions(32), "pos"))
    tied, untied = (
        one(lambda: {"embed": {"embedding": array(11, 4)}, "up": linear(4, 8)}),
        one(lambda: {"embed": {"embedding": array(11, 4)}, "up": linear(4, 8), "lm_head": {"kernel": array(4, 11)}}),
    )
    yield Change(
        "untied",
        tied,
        untied,
        lambda name, old: old["model.embed.embedding"].T if "lm_head" in name else same(name, old),
    )
    yield Change("tied", untied, tied, same)


def _resized_and_renamed(new: Any) -> Origin:
    inner = block_of(new, "embedding")
    return lambda name, old: (
        inner(name, {each.replace("model.", "net."): leaf for each, leaf in old.items()})
        if "embedding" in name
        else same(name.replace("net.", "model."), old)
    )


def _list_forms() -> Iterator[Change]:
    one = lambda make, *args: lambda: {"model": make(*args)}  # noqa: E731
    half = lambda tree: jax.tree.map(lambda each: each.astype(jnp.bfloat16), tree)  # noqa: E731
    cast = lambda dtype: lambda name, old: old[name].astype(dtype)  # noqa: E731
    yield Change("to bfloat16", one(tower), lambda: {"model": half(tower())}, cast(jnp.bfloat16))
    yield Change("to float32", lambda: {"model": half(tower())}, one(tower), cast(jnp.float32))
    yield Change(
        "to bfloat16, renamed",
        one(tower, 3, "blocks"),
        lambda: {"model": half(tower())},
        lambda name, old: old[name.replace(".layers.", ".blocks.")].astype(jnp.bfloat16),
    )

    def fused(key_size: int = 4) -> State:
        layer = {"attn": {"c_attn": linear(4, 4 + 2 * key_size), "o": linear(4, 4)}}
        return {"h": {str(n): jax.tree.map(jnp.copy, layer) for n in range(2)}}

    def apart(key_size: int = 4) -> State:
        sizes = {"q": 4, "k": key_size, "v": key_size, "o": 4}
        return {"h": {str(n): {"attn": {name: linear(4, size) for name, size in sizes.items()}} for n in range(2)}}

    def cut(key_size: int) -> Origin:
        starts = {"q": (0, 4), "k": (4, 4 + key_size), "v": (4 + key_size, 4 + 2 * key_size)}

        def origin(name: str, old: Leaves) -> Any:
            piece = name.split(".")[-2]
            if piece not in starts:
                return same(name, old)
            return old[name.replace(f".{piece}.", ".c_attn.")][..., slice(*starts[piece])]

        return origin

    def joined(name: str, old: Leaves) -> Any:
        if "c_attn" not in name:
            return same(name, old)
        return np.concatenate([old[name.replace("c_attn", piece)] for piece in "qkv"], axis=-1)

    yield Change("fused query, key, value split", one(fused), one(apart), cut(4))
    yield Change("query, key, value fused", one(apart), one(fused), joined)
    yield Change("fused with fewer key heads, split", one(fused, 2), one(apart, 2), cut(2))
    yield Change(
        "fused gate and up split",
        one(lambda: {"mlp": {"gate_up": {"kernel": array(4, 16)}}}),
        one(lambda: {"mlp": {"gate": {"kernel": array(4, 8)}, "up": {"kernel": array(4, 8)}}}),
        lambda name, old: old["model.mlp.gate_up.kernel"][:, slice(0, 8) if "gate" in name else slice(8, 16)],
    )
    yield Change(
        "convolutions of PyTorch",
        one(lambda: {"conv": {"weight": array(8, 3, 5, 5), "bias": array(8)}}),
        one(lambda: {"conv": {"kernel": array(5, 5, 3, 8), "bias": array(8)}}),
        lambda name, old: old["model.conv.weight"].transpose(2, 3, 1, 0) if "kernel" in name else same(name, old),
    )


def _list_parts() -> Iterator[Change]:
    one = lambda make, *args: lambda: {"model": make(*args)}  # noqa: E731

    def with_lora() -> State:
        layers = {str(n): block() for n in range(3)}
        for each in layers.values():
            each["attn"]["q"] |= {"lora_a": array(4, 2), "lora_b": array(2, 4)}
        return {**tower(), "layers": layers}

    def wrapped_lora() -> State:
        layers = {str(n): block() for n in range(3)}
        for each in layers.values():
            each["attn"]["q"] = {"base": each["attn"]["q"], "lora": {"a": array(4, 2), "b": array(2, 4)}}
        return {**tower(), "layers": layers}

    yield Change("LoRA on", one(tower), one(with_lora), same)
    yield Change("LoRA off", one(with_lora), one(tower), same)
    yield Change(
        "LoRA on, base wrapped",
        one(tower),
        one(wrapped_lora),
        fresh_where(".lora.", otherwise=renamed((".base.", "."))),
    )
    yield Change("LoRA off, base unwrapped", one(wrapped_lora), one(tower), renamed((".q.", ".q.base.")))
    norm = lambda name, *leaves: lambda: {"model": {"up": linear(4, 8), name: {each: array(8) for each in leaves}}}  # noqa: E731
    yield Change(
        "BatchNorm to LayerNorm",
        norm("bn", "scale", "bias", "mean", "var"),
        norm("ln", "scale", "bias"),
        renamed((".ln.", ".bn.")),
    )
    yield Change(
        "LayerNorm to BatchNorm", norm("norm", "scale", "bias"), norm("norm", "scale", "bias", "mean", "var"), same
    )
    yield Change("LayerNorm to RMSNorm", norm("norm", "scale", "bias"), norm("norm", "scale"), same)
    yield Change("biases removed", one(tower), lambda: {"model": _drop_keys(tower(), "bias")}, same)
    yield Change("biases added", lambda: {"model": _drop_keys(tower(), "bias")}, one(tower), same)
    yield Change(
        "average of the weights added",
        one(tower),
        lambda: {"model": tower(), "ema": tower()},
        renamed(("ema.", "model.")),
    )
    yield Change("average of the weights removed", lambda: {"model": tower(), "ema": tower()}, one(tower), same)
    yield Change(
        "average of the weights renamed",
        lambda: {"model": tower(), "ema": tower()},
        lambda: {"model": tower(), "average": tower()},
        renamed(("average.", "ema.")),
    )
    yield Change("a new optimizer beside the weights", one(Net), trained(optax.adam(1e-3)), same)
    yield Change("weights without the optimizer", trained(optax.adam(1e-3)), one(Net), same)
    yield Change(
        "a head replaced by one of another task",
        one(tower),
        one(
            lambda: {
                **{key: each for key, each in tower().items() if key != "head"},
                "reward": {"kernel": array(4, 1), "bias": array(1)},
            }
        ),
        same,
    )
    yield Change("a part on disk too many", one(lambda: {**tower(), "decoder": linear(4, 7)}), one(tower), same)
    yield Change("nothing alike", one(lambda: {"a": array(3, 5)}), one(lambda: {"z": {"q": array(7)}}), same)


def _list_ambiguous() -> Iterator[Change]:
    """Changes in which the names say nothing about two parts of one form: a guess could swap them."""
    one = lambda make, *args: lambda: {"model": make(*args)}  # noqa: E731
    rest = {"up": linear(3, 5)}
    yield Change(
        "two alike parts, renamed beyond recognition",
        one(lambda: {**rest, "encoder": linear(4, 4), "decoder": linear(4, 4)}),
        one(lambda: {**rest, "src": linear(4, 4), "tgt": linear(4, 4)}),
        same,
    )
    yield Change(
        "a list to names of equal form",
        one(lambda: {**rest, "heads": {"0": linear(4, 4), "1": linear(4, 4)}}),
        one(lambda: {**rest, "policy": linear(4, 4), "value": linear(4, 4)}),
        same,
    )
    yield Change(
        "swapped by names that stay alike",
        one(lambda: {**rest, "encoder": linear(4, 4), "decoder": linear(4, 4)}),
        one(lambda: {**rest, "the_encoder": linear(4, 4), "the_decoder": linear(4, 4)}),
        renamed(("the_", "")),
    )


def _drop_keys(tree: Any, name: str) -> Any:
    return (
        {key: _drop_keys(each, name) for key, each in tree.items() if key != name} if isinstance(tree, dict) else tree
    )
