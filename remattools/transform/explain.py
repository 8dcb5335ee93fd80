# SPDX-License-Identifier: Apache-2.0
"""What rules do to a model, module by module, as data and as a table.

Sits on `apply` (decisions and actions in force) and `region_contents` (values inside a region). Explaining changes
nothing. The public `explain` is in `analysis.explain_call`, which traces the call.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from ..rules.fold_paths import format_paths, mask_path, mask_text
from ..rules.paths import Path, format_path
from ..rules.rule import Remat
from ..rules.ruleset import Rules
from ..text import make_table, render_text
from . import apply as application
from . import region_contents
from .author_regions import AuthorRegion, format_regions
from .derive import get_base_class
from .modules import ModuleEntry, find_modules
from .naming.names import NamedValue
from .tiling.report import TiledStretch, UncutValue, make_stretch_table, make_uncut_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplanationRow:
    """What the rules do to one module.

    Attributes:
        path: First path from the root; "." is the root.
        aliases: Other paths that reach the module.
        cls: Name of its class.
        action: The action in force, or None.
        rule: Pattern of the deciding rule; "" if no rule matches, or if no rules were passed to `explain`.
        shadowed: Patterns of the matching rules that a later rule overrides.
        shares: How many modules of equal structure share its trace, itself included; 1 if it is traced
            separately, 0 without an action.
        values: Values inside the region that `save` and `offload` can name, in trace order (`names=True`).
        warnings: Sentences on side effects, repeated recomputation and rules without effect.
        author_regions: The regions in the model's own code that it runs in; only with a call.
    """

    path: str
    aliases: tuple[str, ...] = ()
    cls: str
    action: Remat | None = None
    rule: str = ""
    shadowed: tuple[str, ...] = ()
    shares: int = 0
    values: tuple[NamedValue, ...] = ()
    warnings: tuple[str, ...] = ()
    author_regions: tuple[AuthorRegion, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
    """What rules do to a model; `str()` is a table.

    Attributes:
        rows: One for each module in model order, without containers (`nnx.List`, `nnx.Dict`).
        tiles: What is computed in pieces; with a call only.
        uncut: Large values that stay whole under a `Tile`, with the reason; with a call only.

    Example:
        >>> from flax import nnx
        >>> import remattools as rt
        >>> explanation = rt.explain(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {".": "dots_saveable"})
        >>> [(row.path, row.cls, row.rule) for row in explanation.regions]
        [('.', 'Linear', '.')]
    """

    rows: tuple[ExplanationRow, ...]
    tiles: tuple[TiledStretch, ...] = ()
    uncut: tuple[UncutValue, ...] = ()

    @property
    def regions(self) -> tuple[ExplanationRow, ...]:
        """The rows with an action."""
        return tuple(row for row in self.rows if row.action is not None)

    def __str__(self) -> str:
        warnings = [f"{path}: {warning}" for path, warning in _merge_warnings(self.rows)]
        values = [render_text(_make_values_table(row)) for row in self.rows if row.values]
        tiles = [render_text(make_stretch_table(self.tiles))] if self.tiles else []
        tiles += [render_text(make_uncut_table(self.uncut))] if self.uncut else []
        return "\n".join([render_text(self.__rich__()), *warnings, *tiles, *values])

    def __rich__(self) -> Table:
        titles = ["module", "class", "action", "shared by"]
        if any(row.rule for row in self.rows):  # actions in force no longer have rules
            titles[3:3] = ["rule", "shadowed"]
        rows = []
        for path, row in _merge_rows(self.rows):
            cells = {
                "module": path,
                "class": row.cls,
                "action": "" if row.action is None else describe(row.action),
                "rule": row.rule,
                "shadowed": ", ".join(row.shadowed),
                "shared by": str(row.shares) if row.shares else "",
            }
            rows.append([cells[title] for title in titles])
        return make_table(titles, rows)


def explain_model(model: Any, rules: Any = None, *, program: Any = None, names: bool = False) -> Explanation:
    """Explain what rules would do to a model, or which actions are in force on it.

    Args:
        model: An nnx module, or a pytree of modules; concrete or abstract.
        rules: Rules in any form, or None for the actions that are in force.
        program: A call of the model as a closed jaxpr with module paths and without regions. With it, side effects and
            random operations inside regions are found. None for a look at the modules alone.
        names: List the values of `program` that `save` and `offload` can name in each region.

    Raises:
        UnmatchedRuleError: If a rule matches no module that can be called.
        RuleError: If `model` holds no modules.
    """
    if rules is None:
        entries, rows = _explain_active(model)
    else:
        entries, rows = _explain_rules(model, application.coerce_rules(rules, None))
    rows = _add_shares(entries, rows)
    if program is not None:
        rows = _add_contents(entries, rows, program, names=names)
    shown = [row for entry, row in zip(entries, rows, strict=True) if not entry.container]
    return Explanation(rows=tuple(shown))


def describe(action: Remat) -> str:
    """Describe an action in a few words, such as `dots_saveable, save attn.qkv`."""
    parts = ["nothing_saveable" if action.policy is None else str(action.policy)]
    if (action.policy is None and (action.save or action.offload)) or action.is_tile_alone:
        parts = []
    parts += [f"save {name}" for name in action.save] + [f"offload {name}" for name in action.offload]
    if action.group != 1:
        parts.append(f"group {action.group}" + (" nested" if action.nested else ""))
    if action.tile is not None:
        parts.append(f"{action.tile.pieces} pieces" if action.tile.rows is None else f"pieces of {action.tile.rows}")
    if action.methods != ("__call__",):
        parts.append("in " + ", ".join(action.methods))
    return ", ".join(parts)


def _explain_active(model: Any) -> tuple[list[ModuleEntry], list[ExplanationRow]]:
    entries = find_modules(model)
    actions = application.get_active_actions(entries)
    return entries, [_make_row(entry, action=action) for entry, action in zip(entries, actions, strict=True)]


def _explain_rules(model: Any, rules: Rules) -> tuple[list[ModuleEntry], list[ExplanationRow]]:
    entries, decisions = application.decide(model, rules)
    patterns = [pattern.text for pattern, _ in rules]
    rows = []
    for entry, decision, before in zip(entries, decisions, application.get_active_actions(entries), strict=True):
        action = decision.action if isinstance(decision.action, Remat) else None
        if decision.rule is None:
            action = before
        rows.append(
            _make_row(
                entry,
                action=action,
                rule="" if decision.rule is None else patterns[decision.rule],
                shadowed=tuple(patterns[number] for number in decision.shadowed),
            )
        )
    return entries, rows


def _make_row(
    entry: ModuleEntry, *, action: Remat | None, rule: str = "", shadowed: tuple[str, ...] = ()
) -> ExplanationRow:
    return ExplanationRow(
        path=format_path(entry.path),
        aliases=tuple(format_path(path) for path in entry.paths[1:]),
        cls=get_base_class(type(entry.module)).__name__,
        action=action,
        rule=rule,
        shadowed=shadowed,
    )


def _add_shares(entries: list[ModuleEntry], rows: list[ExplanationRow]) -> list[ExplanationRow]:
    """Count regions of equal structure, and warn of regions inside regions."""
    regions = {i: entry for i, entry in enumerate(entries) if rows[i].action is not None}
    keys = {i: region_contents.make_structure_key(entry.module, rows[i].action) for i, entry in regions.items()}
    counts: dict[Any, int] = {}
    for key in keys.values():
        if key is not None:
            counts[key] = counts.get(key, 0) + 1
    rows = list(rows)
    for i, entry in regions.items():
        notes = list(rows[i].warnings)
        outer = _find_enclosing_region(entry, regions, i)
        action = rows[i].action
        if outer is not None and not (action is not None and action.is_tile_alone):
            notes.append(
                f"is inside the region {format_path(outer)}: the backward pass recomputes it with that region, and "
                "then again by itself; save its output there, or exclude one of the two with False."
            )
        if keys[i] is None:
            notes.append("is traced separately: it holds a static value that cannot be compared by value.")
        rows[i] = dataclasses.replace(rows[i], shares=1 if keys[i] is None else counts[keys[i]], warnings=tuple(notes))
    return rows


def _add_contents(
    entries: list[ModuleEntry], rows: list[ExplanationRow], program: Any, *, names: bool
) -> list[ExplanationRow]:
    """Add the values and warnings from a traced call of the model."""
    regions = [i for i, row in enumerate(rows) if row.action is not None]
    views = region_contents.find_contents(program, [entries[i].path for i in regions])
    rows = list(rows)
    for i, view in zip(regions, views, strict=True):
        values = view.values if names else ()
        random = region_contents.describe_random(view.values, rows[i].action or Remat())
        notes = rows[i].warnings + view.warnings + ((random,) if random else ())
        notes += _find_stacked_warnings(rows[i].action, view) + _find_author_warnings(view)
        rows[i] = dataclasses.replace(rows[i], values=values, warnings=notes, author_regions=view.around)
    return _add_useless_warnings(rows, dict(zip(regions, views, strict=True)))


def _find_stacked_warnings(action: Remat | None, view: region_contents.RegionContents) -> tuple[str, ...]:
    """Warn of `every_n` on stacked layers: it counts along a list around them, never along the scan."""
    if action is None or action.every_n == 1 or not view.is_stacked:
        return ()
    return (
        f"is run by a scan over stacked layers, which are one module: every_n={action.every_n} takes all layers or "
        "none; group= puts several layers of a scan into one region.",
    )


def _find_author_warnings(view: region_contents.RegionContents) -> tuple[str, ...]:
    """Warn of `jax.checkpoint` and `nnx.remat` in the model's code, around a region or inside it."""
    notes = []
    if view.around:
        notes.append(describe_author_regions(view.around))
    if view.inside:
        notes.append(
            f"holds {format_regions(view.inside)}: the backward pass recomputes its inside with this region, and then "
            "again by itself; names inside it are out of reach. Switch one of the two off."
        )
    return tuple(notes)


def describe_author_regions(regions: Sequence[AuthorRegion]) -> str:
    """Describe to a reader the regions of the model's code that a module runs in, and what to do."""
    return (
        f"runs inside {format_regions(regions)}, which decides what is saved: a rule here frees nothing and recomputes "
        "once more. Switch it off in the model (a setting such as remat_policy, or the line), and the rule takes its "
        "place; or remove the rule."
    )


def _add_useless_warnings(
    rows: list[ExplanationRow], views: dict[int, region_contents.RegionContents]
) -> list[ExplanationRow]:
    """Warn of rules whose modules compute nothing that could be freed, or are not called."""
    useful = {rows[i].rule for i, view in views.items() if view.has_activations}
    rows = list(rows)
    for i, view in views.items():
        if rows[i].rule in useful:
            continue
        reason = "computes nothing but what it returns" if view.values else "is not called with these arguments"
        note = f"{reason}, so it has no activation to free and the rule does not change memory."
        rows[i] = dataclasses.replace(rows[i], warnings=(*rows[i].warnings, note))
    return rows


def _find_enclosing_region(entry: ModuleEntry, regions: dict[int, ModuleEntry], index: int) -> Path | None:
    for i, other in regions.items():
        path = other.path
        if i != index and len(path) < len(entry.path) and entry.path[: len(path)] == path:
            return path
    return None


def _merge_rows(rows: Sequence[ExplanationRow]) -> list[tuple[str, ExplanationRow]]:
    """Merge equal rows of a sequence into one: `layers.[0:32].attn`."""
    groups: dict[Any, list[ExplanationRow]] = {}
    for row in rows:
        key = (mask_path(row.path), row.cls, row.action, row.rule, row.shadowed, row.shares)
        groups.setdefault(key, []).append(row)
    return [(format_paths([row.path for row in group]), group[0]) for group in groups.values()]


def _merge_warnings(rows: Sequence[ExplanationRow]) -> list[tuple[str, str]]:
    """Merge warnings that differ only in indices; the first one's text is shown."""
    groups: dict[Any, list[tuple[str, str]]] = {}
    for row in rows:
        for warning in row.warnings:
            groups.setdefault((mask_path(row.path), mask_text(warning)), []).append((row.path, warning))
    return [(format_paths([path for path, _ in group]), group[0][1]) for group in groups.values()]


def _make_values_table(row: ExplanationRow) -> Table:
    rows = []
    for value in row.values:
        shape = ", ".join(aval.str_short(short_dtypes=True) for aval in value.avals)
        note = "" if value.reachable else "unreachable"
        rows.append([value.label, str(value.index), shape, str(value.bytes), note])
    table = make_table(("name", "index", "shape", "bytes", ""), rows, numeric=("index", "bytes"))
    table.title = Text(f"names in {row.path}")
    return table
