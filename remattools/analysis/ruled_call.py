# SPDX-License-Identifier: Apache-2.0
"""The model that a call runs, and that model under rules for the duration of a block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flax import nnx

from ..errors import MeasureError
from ..rules.paths import format_path
from ..rules.policy_types import Policy
from ..rules.rule import Remat
from ..rules.ruleset import LOSS, Rules
from ..rules.tile import Tile
from ..tracing import pure_call
from ..transform import apply as application
from ..transform.functions import apply_loss_rules
from ..transform.modules import find_modules


def find_model(fn: Any, args: tuple[Any, ...]) -> nnx.Module:
    """Return the first model that a call is passed or closes over.

    Raises:
        MeasureError: If the call has no model.
    """
    models: list[nnx.Module] = pure_call.stage(fn, args).models
    if not models:
        raise MeasureError(
            what="no nnx model was found in the arguments or in what the function closes over.",
            why="rules apply to a model; a graphdef that was split off earlier does not see them.",
            fix="pass the model: fn(model, batch).",
        )
    return models[0]


def make_rules(model: nnx.Module, rules: Any) -> Rules:
    """Return the rules that a candidate stands for.

    Args:
        model: The model they are for.
        rules: Rules in any form, the path of a rule file, or an action alone, which applies to every block.

    Raises:
        MeasureError: If it is an action alone, and the model has no sequence of blocks.
    """
    if not is_bare_action(rules):
        return Rules.coerce(rules)
    sequences = application.find_outermost_sequences(model)
    if not sequences:
        raise MeasureError(
            what=f"the candidate {rules!r} does not say which modules it is for.",
            why="an action alone applies to every block, and the model has no sequence of blocks.",
            fix=f'{{"{_find_first_child(model)}": {rules!r}}}, with the path of a module or a pattern.',
        )
    return Rules(dict.fromkeys(sequences, rules))


def is_bare_action(rules: Any) -> bool:
    """Whether it is an action without a pattern: a policy, a `Remat` or a `Tile`."""
    if isinstance(rules, str):
        return not rules.endswith(".toml")
    return isinstance(rules, Remat | Tile | Policy) or (callable(rules) and not isinstance(rules, Rules))


def _find_first_child(model: nnx.Module) -> str:
    paths = [format_path(entry.path) for entry in find_modules(model) if entry.path]
    return paths[0] if paths else "."


@contextmanager
def use_rules(model: Any, rules: Rules | None, fn: Any = None) -> Iterator[Any]:
    """Apply rules for the duration of a block; None leaves everything as it is.

    Args:
        model: The model; the rules for its modules are applied in place.
        rules: The rules.
        fn: The function that is called, for the rule "@loss".

    Yields:
        The function to call in the block.
    """
    if rules is None:
        yield fn
        return
    of_modules = Rules((pattern, action) for pattern, action in rules if pattern.text != LOSS)
    ruled_fn = fn if len(of_modules) == len(rules) else apply_loss_rules(fn, rules)
    if not len(of_modules):
        yield ruled_fn
        return
    with application.applied(model, of_modules):
        yield ruled_fn
