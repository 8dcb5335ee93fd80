# SPDX-License-Identifier: Apache-2.0
"""Which modules are blocks."""

from flax import nnx

from remattools.planner.model.block_detection import find_blocks

from ...models import Tower


class _Stage(nnx.Module):
    """Holds blocks and cannot be called itself."""

    def __init__(self) -> None:
        self.blocks = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0))])


class _Mixed(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.down = nnx.List([nnx.List([nnx.Linear(2, 2, rngs=rngs), nnx.Linear(2, 2, rngs=rngs)]) for _ in range(2)])
        self.named = nnx.Dict(enc_0=nnx.Linear(2, 2, rngs=rngs), enc_1=nnx.Linear(2, 2, rngs=rngs))
        self.towers = nnx.List([Tower(depth=2)])
        self.stages = nnx.List([_Stage()])
        self.head = nnx.Linear(2, 2, rngs=rngs)


def test_blocks_are_found_in_nested_containers() -> None:
    found = [pattern for pattern, _ in find_blocks(_Mixed())]
    assert found == ["down.0.*", "down.1.*", "named.*", "stages.0.blocks.*", "towers.*"]
    assert [pattern for pattern, _ in find_blocks(Tower())] == ["layers.*"]
    assert [pattern for pattern, _ in find_blocks(nnx.List([Tower()]))] == ["*"]
    assert [pattern for pattern, _ in find_blocks(Tower().layers[0])] == ["attention", "mlp", "norm"]
