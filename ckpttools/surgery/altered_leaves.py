# SPDX-License-Identifier: Apache-2.0
"""Describe what a restore does to each leaf: the rows of a preview and of a restore's report."""

import dataclasses

from ..spec.operations import Cast
from ..tree.records import format_form
from .plan import PlacedLeaf, RestorePlan, SourceLeaf
from .resize import needs_pad, needs_slice


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlteredLeaf:
    """One leaf and what a restore does to it.

    Example:
        >>> import ckpttools as ct
        >>> leaf = ct.AlteredLeaf(name="model.a", action="renamed", source="model.b", before="f32[2]", after="f32[2]")
        >>> print(leaf)
        model.a: renamed from model.b, f32[2]

    Attributes:
        name: Its name in the state; "" for a leaf on disk that is dropped or excluded.
        action: "renamed", "copied", "stacked", "unstacked", "merged", "split", "transposed", "cast", "sliced",
            "padded", "wrapped" (key data on disk, typed keys in the state) and "unwrapped" (the reverse), joined by
            commas, or "kept", "dropped" or "excluded" (on disk, but not state); "" if it is
            restored unchanged.
        source: Its name on disk; for a joined leaf, the name of the first part; "" if the state keeps its value.
        before: Dtype and shape on disk.
        after: Dtype and shape in the state.
    """

    name: str
    action: str
    source: str = ""
    before: str = ""
    after: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return the leaf as a dict of strings."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        if not self.source:
            return f"{self.name}: {self.action}"
        forms = self.before if self.before == self.after or not self.after else f"{self.before} to {self.after}"
        origin = f" from {self.source}" if self.name and self.source != self.name else ""
        return f"{self.name or self.source}: {self.action or 'restored'}{origin}, {forms}"


def list_altered_leaves(plan: RestorePlan) -> tuple[AlteredLeaf, ...]:
    """Return the leaves that are not restored unchanged."""
    return tuple(leaf for leaf in list_leaves(plan) if leaf.action)


def list_leaves(plan: RestorePlan) -> tuple[AlteredLeaf, ...]:
    """Return every leaf of the state, and every leaf on disk that is dropped."""
    return (
        *map(_describe_leaf, plan.placed_leaves),
        *(_describe_unread_leaf(source, "dropped") for source in plan.dropped_leaves),
        *(_describe_unread_leaf(source, "excluded") for source in plan.excluded_leaves),
    )


def _describe_leaf(leaf: PlacedLeaf) -> AlteredLeaf:
    name, source, target = ".".join(leaf.path), leaf.source, leaf.target
    if source is None or target is None:
        return AlteredLeaf(name=name, action="kept")
    actions = ["renamed"] if source.path != source.stored_path and not source.actions else []
    # One leaf may be transposed in each of the parts that are joined.
    actions += dict.fromkeys(action for each in (*source.parts, source) for action in each.actions)
    if source.record.kind != "value":
        changes = (*source.operations, *(each for part in source.parts for each in part.operations))
        actions += ["cast"] if any(isinstance(each, Cast) for each in changes) else []
        if len(source.shape) == len(target.shape):
            actions += ["sliced"] if needs_slice(source.shape, target.shape) else []
            actions += ["padded"] if needs_pad(source.shape, target.shape) else []
    if "key" in (source.record.kind, target.kind) and source.record.kind != target.kind:
        actions.append("wrapped" if target.kind == "key" else "unwrapped")
    stored = list(source.iterate_stored())
    more = f" and {len(stored) - 1} more" if len(stored) > 1 else ""
    return AlteredLeaf(
        name=name,
        action=", ".join(actions),
        source=".".join(stored[0].stored_path) + more,
        before=(f"{len(stored)} x " if more else "") + format_form(stored[0].record),
        after=format_form(target),
    )


def _describe_unread_leaf(source: SourceLeaf, action: str) -> AlteredLeaf:
    return AlteredLeaf(name="", action=action, source=".".join(source.stored_path), before=format_form(source.record))
