# SPDX-License-Identifier: Apache-2.0
"""Rules that decide what an unedited flax.nnx model saves, offloads or recomputes.

Regions: a module call whose inside is rematerialised. Rules: path patterns with
actions. Start with `apply(model, {"layers.*": "nothing_saveable"})` and
`explain(model)`.
"""

from .analysis.check import CheckReport as CheckReport
from .analysis.check import check as check
from .analysis.compare import Comparison as Comparison
from .analysis.compare import compare as compare
from .analysis.measure import measure as measure
from .analysis.residuals import Residual as Residual
from .analysis.residuals import ResidualReport as ResidualReport
from .analysis.residuals import residuals as residuals
from .analysis.timeline import Timeline as Timeline
from .analysis.timeline import timeline as timeline
from .compiler.report import Measurement as Measurement
from .compiler.targets import Target as Target
from .compiler.targets import find_target as find_target
from .errors import BudgetError as BudgetError
from .errors import CacheWarning as CacheWarning
from .errors import CallError as CallError
from .errors import MeasureError as MeasureError
from .errors import PatternError as PatternError
from .errors import PolicyError as PolicyError
from .errors import RematError as RematError
from .errors import RuleError as RuleError
from .errors import RuleFileError as RuleFileError
from .errors import TargetError as TargetError
from .errors import UnmatchedRuleError as UnmatchedRuleError
from .errors import UnmatchedRuleWarning as UnmatchedRuleWarning
from .planner.frontier import Frontier as Frontier
from .planner.plan import frontier as frontier
from .planner.plan import plan as plan
from .planner.result import Plan as Plan
from .rules import policies as policies
from .rules.rule import Remat as Remat
from .rules.ruleset import Rules as Rules
from .transform.apply import applied as applied
from .transform.apply import apply as apply
from .transform.apply import revert as revert
from .transform.decorator import remat as remat
from .transform.explain import Explanation as Explanation
from .transform.explain import explain as explain
