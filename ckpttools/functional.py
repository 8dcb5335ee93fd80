# SPDX-License-Identifier: Apache-2.0
"""The functions of the checkpointing guide, with its names, signatures and return values, on top of a session.

They differ from the guide where it is unsafe: a damaged step is recognised by its digests and skipped with a warning, a
model that does not fit raises instead of suggesting a fresh start, validation leaves the live model alone and fails on
NaN, nothing is gathered on one device, and a resumed run makes as many updates as an uninterrupted one.
docs/guide-checkpointing.md covers the guide block by block.

Example:
    >>> import tempfile
    >>> from ckpttools import functional
    >>> manager, path = functional.setup_checkpoint_manager(tempfile.mkdtemp())
    >>> functional.save_checkpoint(manager, {"count": 1}, step=1).latest_step()
    1
    >>> manager.close()
"""

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from .errors import CheckpointWarning, SpecError, StepDamagedError
from .integrations.orbax_manager import CheckpointManager as CheckpointManager
from .spec.spec import CheckpointSpec

TOLERANCE = 1e-5
"""Largest difference between outputs before and after a save that passes a validation; the guide's value."""


def setup_checkpoint_manager(base_dir: str | os.PathLike[str] | CheckpointSpec) -> tuple[CheckpointManager, str]:
    """Open a run.

    Args:
        base_dir: The run directory, relative or absolute, in which all steps are kept; or a spec.

    Returns:
        The manager and the absolute path of the directory.

    Example:
        >>> import tempfile
        >>> from ckpttools import functional
        >>> manager, path = functional.setup_checkpoint_manager(tempfile.mkdtemp())
        >>> manager.all_steps()
        []
        >>> manager.close()
    """
    manager = CheckpointManager(base_dir)
    return manager, str(manager.directory)


def save_checkpoint(checkpoint_manager: CheckpointManager, model: Any, step: int) -> CheckpointManager:
    """Save a model; it is on disk when the call returns.

    Args:
        checkpoint_manager: The run.
        model: The model, or any pytree of arrays.
        step: Completed updates.

    Returns:
        The manager.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> from ckpttools import functional
        >>> manager, path = functional.setup_checkpoint_manager(tempfile.mkdtemp())
        >>> functional.save_checkpoint(manager, {"w": jnp.ones(2)}, step=1).latest_step()
        1
        >>> functional.load_checkpoint(manager, {"w": jnp.zeros(2)})
        ({'w': Array([1., 1.], dtype=float32)}, 1)
        >>> manager.close()
    """
    return _save(checkpoint_manager, step, {"model": model})


def load_checkpoint(
    checkpoint_manager: CheckpointManager, target_model_template: Any, step: int | None = None
) -> tuple[Any, int | None]:
    """Fill a model from a step.

    Args:
        checkpoint_manager: The run.
        target_model_template: A model of the same structure; filled in place.
        step: Number of the step; None for the newest intact one.

    Returns:
        The model and its step; (None, None) if the run has no steps.

    Raises:
        NoIntactStepError: If the run has steps and none is intact.
        StructureError: If the model does not fit; it was not changed.
        StepNotFoundError: If `step` does not exist.
        StepDamagedError: If `step` is damaged.
    """
    report = checkpoint_manager.load({"model": target_model_template}, step)
    return (None, None) if report.step is None else (report.state["model"], report.step)


def save_model_and_optimizer(
    checkpoint_manager: CheckpointManager, model: Any, optimizer: Any, step: int
) -> CheckpointManager:
    """Save a model and its optimizer; they are on disk when the call returns."""
    return _save(checkpoint_manager, step, {"model": model, "optimizer": optimizer})


def load_model_and_optimizer(
    checkpoint_manager: CheckpointManager, model_template: Any, optimizer_template: Any, step: int | None = None
) -> tuple[Any, Any, int | None]:
    """Fill a model and its optimizer from a step.

    Args:
        checkpoint_manager: The run.
        model_template: A model of the same structure; filled in place.
        optimizer_template: Its optimizer; filled in place.
        step: Number of the step; None for the newest intact one.

    Returns:
        Model, optimizer and step; (None, None, None) if the run has no steps.

    Raises:
        CheckpointError: As `load_checkpoint`.
    """
    report = checkpoint_manager.load({"model": model_template, "optimizer": optimizer_template}, step)
    if report.step is None:
        return None, None, None
    return report.state["model"], report.state["optimizer"], report.step


def save_sharded_checkpoint(
    checkpoint_manager: CheckpointManager, model: Any, step: int, num_shards: int = 4
) -> CheckpointManager:
    """Save a model whose arrays are sharded over devices.

    Args:
        checkpoint_manager: The run.
        model: The model; its arrays stay where they are.
        step: Completed updates.
        num_shards: Ignored; part of the guide's signature. The files follow the arrays' own shardings.
    """
    if type(num_shards) is not int or num_shards < 1:
        raise SpecError(
            what=f"num_shards={num_shards!r} is not a positive int.",
            why="in the guide it is a number of files; here the arrays' own shardings decide.",
            fix="leave it out, or pass num_shards=4.",
        )
    return save_checkpoint(checkpoint_manager, model, step)


def load_sharded_checkpoint(
    checkpoint_manager: CheckpointManager, model_template: Any, step: int | None = None
) -> tuple[Any, int | None]:
    """Fill a model from a step, each array sharded as in the template, whatever its sharding at the save."""
    return load_checkpoint(checkpoint_manager, model_template, step)


def save_and_validate_checkpoint(
    checkpoint_manager: CheckpointManager, model: Any, step: int, validation_data: Any
) -> bool:
    """Save a model, read it back into another, and compare their outputs; the live model does not change.

    Args:
        checkpoint_manager: The run.
        model: The model; a copy is called, since a call may change running averages and random streams.
        step: Completed updates.
        validation_data: What the model is called with.

    Returns:
        Whether the outputs are finite and equal within `TOLERANCE`; if not, a warning says what is wrong.
    """
    expected = nnx.clone(model)(validation_data)
    save_checkpoint(checkpoint_manager, model, step)
    graphdef, state = nnx.split(model)
    empty = jax.tree.map(
        lambda leaf: (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            if isinstance(leaf, jax.Array)
            else leaf
        ),
        state,
    )
    try:
        report = checkpoint_manager.load({"model": empty}, step)
    except StepDamagedError as error:
        return _warn_invalid(step, str(error))
    found = nnx.merge(graphdef, report.state["model"])(validation_data)
    for (path, before), after in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        name = f"output{jax.tree_util.keystr(path)}"
        if not bool(jnp.all(jnp.isfinite(before))):
            return _warn_invalid(step, f"{name} is not finite before the save.")
        if not bool(jnp.allclose(before, after, rtol=0, atol=TOLERANCE)):
            return _warn_invalid(step, f"{name} is not the same after the save.")
    return True


def setup_training_from_checkpoint(
    checkpoint_dir: str | os.PathLike[str] | CheckpointSpec,
    config: Any,
    *,
    create_model: Callable[..., Any],
    create_optimizer: Callable[[Any, Any], Any] | None = None,
) -> tuple[Any, Any, int, CheckpointManager]:
    """Create a model and an optimizer, and resume from the newest intact step if there is one.

    Args:
        checkpoint_dir: The run directory, or a spec.
        config: Passed to the two functions.
        create_model: Called as `create_model(config, rngs=nnx.Rngs(0))`.
        create_optimizer: Called as `create_optimizer(model, config)`; by default Adam with `config`'s learning_rate.

    Returns:
        Model, optimizer, start step and manager. The start step is the number of completed updates, so that
        `for step in range(start_step, num_steps)`, saved as `step + 1`, repeats and skips none.

    Raises:
        NoIntactStepError: If the run has steps and none is intact.
        StructureError: If the newest step does not fit.
    """
    checkpoint_manager, _ = setup_checkpoint_manager(checkpoint_dir)
    model = create_model(config, rngs=nnx.Rngs(0))
    optimizer = (create_optimizer or _make_adam)(model, config)
    _, _, step = load_model_and_optimizer(checkpoint_manager, model, optimizer)
    return model, optimizer, step or 0, checkpoint_manager


def recover_from_corruption(
    checkpoint_dir: str | os.PathLike[str] | CheckpointSpec, model_template: Any
) -> tuple[Any, int | None]:
    """Fill a model from the newest intact step; damaged steps are skipped with a warning that names them.

    Args:
        checkpoint_dir: The run directory, or a spec.
        model_template: A model of the same structure; filled in place.

    Returns:
        The model and its step; (None, None) if the run has no steps.

    Raises:
        NoIntactStepError: If the run has steps and none is intact, so that it is never mistaken for a new run.
        StructureError: If the model does not fit.
    """
    checkpoint_manager, _ = setup_checkpoint_manager(checkpoint_dir)
    try:
        return load_checkpoint(checkpoint_manager, model_template)
    finally:
        checkpoint_manager.close()


def _save(checkpoint_manager: CheckpointManager, step: int, items: Mapping[str, Any]) -> CheckpointManager:
    checkpoint_manager.save(step, items)
    checkpoint_manager.wait_until_finished()
    return checkpoint_manager


def _warn_invalid(step: int, reason: str) -> bool:
    warnings.warn(f"the checkpoint of step {step} is not valid: {reason}", CheckpointWarning, stacklevel=3)
    return False


def _make_adam(model: Any, config: Any) -> Any:
    rate = config["learning_rate"] if isinstance(config, Mapping) else config.learning_rate
    return nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param)
