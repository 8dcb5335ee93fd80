# SPDX-License-Identifier: Apache-2.0
"""Rules: patterns with actions, in order; the last that matches a module wins.

An ordered, hashable value, built from a mapping, pairs or TOML, and written as TOML.
"""

import dataclasses
import difflib
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import RuleError
from . import rule_file
from .paths import Pattern
from .policies import PolicyLike, nothing_saveable, resolve
from .policy_types import Policy
from .rule import Action, Remat, coerce_action

_PRESETS = pathlib.Path(__file__).with_name("presets")


# The pattern for what a loss computes around its model; no module has such a path.
LOSS = "@loss"


class Rules:
    """Ordered rules; the last that matches a module wins.

    Args:
        rules: A mapping from patterns to actions, or pairs of both; none by default.

    Raises:
        PatternError: If a pattern has a syntax error.
        RuleError: If an action is invalid.

    Example:
        >>> rules = Rules({"layers.*": "nothing_saveable", "layers.[-1]": False})
        >>> len(rules | {"head": "dots_saveable"})
        3
    """

    __slots__ = ("_pairs",)

    def __init__(self, rules: "Mapping[str, Any] | Iterable[tuple[str | Pattern, Any]] | Rules" = ()) -> None:
        pairs = rules.items() if isinstance(rules, Mapping) else rules
        self._pairs: tuple[tuple[Pattern, Action], ...] = tuple(
            (pattern if isinstance(pattern, Pattern) else Pattern.parse(pattern), coerce_action(action))
            for pattern, action in pairs
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Rules":
        """Read the `[remat]` table of a TOML file.

        Args:
            path: The file; its other tables are ignored.

        Raises:
            RuleFileError: If the file cannot be read or holds an invalid rule; the message names file and line.

        Example:
            >>> import pathlib, tempfile
            >>> with tempfile.TemporaryDirectory() as directory:
            ...     file = pathlib.Path(directory, "rules.toml")
            ...     written = file.write_text('remat.rules = { "layers.*" = "dots_saveable" }')
            ...     Rules.load(file)
            Rules([('layers.*', Remat(policy='dots_saveable'))])
        """
        return cls(rule_file.load(pathlib.Path(path)))

    @classmethod
    def from_toml(cls, text: str, source: str | None = None) -> "Rules":
        """Read the `[remat]` table of a TOML document.

        Args:
            text: The document.
            source: Name of the document in errors.

        Raises:
            RuleFileError: If it is not TOML or holds an invalid rule; the message names the line.

        Example:
            >>> Rules.from_toml('remat.rules = { "layers.*" = "dots_saveable" }')
            Rules([('layers.*', Remat(policy='dots_saveable'))])
        """
        return cls(rule_file.loads(text, source or "<text>"))

    @classmethod
    def preset(cls, name: str) -> "Rules":
        """Return the rules for a known architecture; the preset's file says what they were measured to do.

        Patterns use the module names of google-tunix's models; they fit other models with the same names.

        Args:
            name: Name of the architecture, such as "llama3".

        Raises:
            RuleError: If the preset does not exist.

        Example:
            >>> len(Rules.preset("llama3") | {"layers.[-1]": False})
            2
        """
        if name not in cls.presets():
            near = difflib.get_close_matches(str(name), cls.presets(), n=3, cutoff=0.3) or cls.presets()
            raise RuleError(
                what=f"the preset {name!r} does not exist.",
                why="presets are rule files of this package, by the name of an architecture.",
                fix=f"use {', '.join(map(repr, near))}; Rules.presets() lists all, Rules.load(path) reads yours.",
            )
        return cls.load(_PRESETS / f"{name}.toml")

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Return the names of all presets, in order.

        Example:
            >>> Rules.presets()
            ('gemma', 'gemma3', 'gemma4', 'llama3', 'qwen2', 'qwen3')
        """
        return tuple(sorted(path.stem for path in _PRESETS.glob("*.toml")))

    @classmethod
    def coerce(cls, value: Any) -> "Rules":
        """Return the rules that a value stands for.

        Args:
            value: `Rules`, a mapping from patterns to actions, pairs of both, or the path of a rule file (.toml).

        Raises:
            RuleError: If it is none of these.
            RuleFileError: If it is a path and the file cannot be read.

        Example:
            >>> Rules.coerce({"layers.*": False}) == Rules.coerce([("layers.*", False)])
            True
        """
        if isinstance(value, Rules):
            return value
        if isinstance(value, str | os.PathLike):
            if isinstance(value, str) and not value.endswith(".toml"):
                raise RuleError(
                    what=f"{value!r} is not a rule file.",
                    why="an action needs a pattern that selects its modules.",
                    fix=f'{{"layers.*": {value!r}}}, apply(model, {value!r}, on="layers.*"), or a path in .toml.',
                )
            return cls.load(value)
        if isinstance(value, Mapping):
            return cls(value)
        if isinstance(value, Iterable) and not isinstance(value, Remat):
            pairs = list(value)
            if all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
                return cls(pairs)
        raise RuleError(
            what=f"{value!r} is not a set of rules.",
            why="rules are patterns with actions.",
            fix='{"layers.*": "nothing_saveable"}.',
        )

    def to_toml(self) -> str:
        """Return the rules as `[[remat.rule]]` tables; `from_toml` reads equal rules back.

        Raises:
            RuleError: If a policy is a callable, which has no TOML form.

        Example:
            >>> print(Rules({"layers.*": "dots_saveable"}).to_toml(), end="")
            [[remat.rule]]
            pattern = "layers.*"
            policy = "dots_saveable"
        """
        return rule_file.dumps((pattern.text, action) for pattern, action in self)

    def add_policy(self, policy: PolicyLike) -> "Rules":
        """Return the rules with a policy added to each action: its regions also save what the policy saves.

        Args:
            policy: A policy as `Remat` takes it. Modules that a rule takes out stay out.

        Raises:
            PolicyError: If `policy` does not stand for a policy.

        Example:
            >>> rules = Rules({"layers.*": "dots_saveable", "layers.[-1]": False})
            >>> print(rules.add_policy("dropout_masks_saveable").to_toml(), end="")
            [[remat.rule]]
            pattern = "layers.*"
            policy = "dots_saveable | dropout_masks_saveable"
            <BLANKLINE>
            [[remat.rule]]
            pattern = "layers.[-1]"
            off = true
        """
        added = resolve(policy)
        return Rules((pattern, action and _add_policy(action, added)) for pattern, action in self)

    def __or__(self, other: Any) -> "Rules":
        return Rules((*self._pairs, *Rules.coerce(other)._pairs))

    def __ror__(self, other: Any) -> "Rules":
        return Rules.coerce(other) | self

    def __iter__(self) -> Iterator[tuple[Pattern, Action]]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rules) and self._pairs == other._pairs

    def __hash__(self) -> int:
        return hash(self._pairs)

    def __repr__(self) -> str:
        return f"Rules([{', '.join(f'({pattern.text!r}, {action!r})' for pattern, action in self._pairs)}])"


def _add_policy(action: Remat, added: Policy) -> Remat:
    policy = action.policy
    # A union is written and compared part by part: what saves nothing is left out.
    return dataclasses.replace(action, policy=added if policy is None or policy == nothing_saveable else policy | added)
