# SPDX-License-Identifier: Apache-2.0
"""Rules that decide what an unedited flax.nnx model saves, offloads or recomputes.

Regions: a module call whose inside is rematerialised. Rules: path patterns with
actions. Start with `apply(model, {"layers.*": "nothing_saveable"})` and
`explain(model)`.
"""

from .lazy_imports import attach

__all__ = [
    "BudgetError",
    "CacheWarning",
    "CheckReport",
    "Comparison",
    "Explanation",
    "Frontier",
    "MeasureError",
    "Measurement",
    "PatternError",
    "Plan",
    "PolicyError",
    "Remat",
    "RematError",
    "Residual",
    "ResidualReport",
    "RuleError",
    "RuleFileError",
    "Rules",
    "Target",
    "TargetError",
    "Tile",
    "Timeline",
    "UnmatchedRuleError",
    "UnmatchedRuleWarning",
    "applied",
    "apply",
    "check",
    "compare",
    "explain",
    "find_target",
    "frontier",
    "measure",
    "plan",
    "policies",
    "remat",
    "residuals",
    "revert",
    "tile",
    "timeline",
]

__getattr__, __dir__ = attach(__name__, __file__)
