# SPDX-License-Identifier: Apache-2.0
"""The pattern language over paths: modules in rules, leaves in checkpoints, names in regions.

Pure: strings and tuples, no JAX. The language:

-   `*` matches inside one segment, `**` any number of segments;
-   `{a,b}` matches either alternative;
-   `[start:stop:step]` or `[i]` as a whole segment selects integer segments with
    Python's meaning, so `layers.[:-1]` excludes the last layer;
-   `:Name` at the end requires a class or base class of that name;
-   a pattern without a dot matches the last segment at any depth, as in
    `.gitignore`; "." is the root.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import PatternError

Path = tuple[str | int, ...]

_SEPARATOR = "\x1f"  # precedes every segment in the string a regex sees; no attribute name contains it
_MAX_BRACE_ALTERNATIVES = 1024
_SLICE = re.compile(r"\[(-?\d*)(?:(:)(-?\d*)(?::(-?\d*))?)?\]")
_DIGITS = re.compile(r"(\d+)")
_INDEX = re.compile(r"(?P<rest>.*[^.\s])\[(?P<index>\d+)\]\Z", re.DOTALL)


def format_path(path: Path) -> str:
    """Return a path as a string: segments joined by dots, "." for the root."""
    return ".".join(map(str, path)) or "."


def parse_path(text: str) -> Path:
    """Return the path that a string stands for, the inverse of `format_path`; segments of digits become ints."""
    if text == ".":
        return ()
    return tuple(int(part) if part.isdecimal() else part for part in text.split("."))


def make_natural_key(path: Path) -> tuple[Any, ...]:
    """Return a sort key under which `layer2` comes before `layer10`."""
    return tuple(
        tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in _DIGITS.split(str(segment)) if part)
        for segment in path
    )


# One segment of a pattern: "**", a regex for a name, a slice or an index.
_Token = str | re.Pattern[str] | slice | int


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A pattern over paths; patterns are equal if their strings are.

    Attributes:
        text: The pattern as written.

    Example:
        >>> Pattern("layers.[:-1]").is_match(("layers", 3), lengths={("layers",): 4})
        False
    """

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):  # checked here, because the cache below needs a hashable key
            raise _make_pattern_error(self.text, "it is not a string", 'a pattern such as "layers.*".')
        _compile_pattern(self.text)

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Return the pattern that a string stands for.

        Args:
            text: The pattern as written.

        Raises:
            PatternError: If the string has a syntax error.
        """
        return cls(text)

    def is_match(self, path: Path, class_names: Sequence[str] = (), lengths: Mapping[Path, int] | None = None) -> bool:
        """Return whether a path matches.

        Args:
            path: Segments from the root; indices of sequences are ints.
            class_names: Names of the class and bases of the object at the path; needed if the pattern has `:Name`.
            lengths: Length of the sequence at each path; needed if a slice counts from the end.
        """
        return any(
            alternative.is_match(path, class_names, lengths or {}) for alternative in _compile_pattern(self.text)
        )


@dataclasses.dataclass(frozen=True)
class _Alternative:
    """A pattern without braces."""

    tokens: tuple[_Token, ...]
    regex: re.Pattern[str] | None  # None if a slice needs the sequence's length
    cls: re.Pattern[str] | None

    def is_match(self, path: Path, class_names: Sequence[str], lengths: Mapping[Path, int]) -> bool:
        if self.cls is not None and not any(map(self.cls.fullmatch, class_names)):
            return False
        if self.regex is not None:
            return self.regex.fullmatch(_join_path(path)) is not None
        return _is_match_from(self.tokens, path, 0, lengths)


class PathIndex:
    """All paths of a tree, prepared for many patterns.

    Args:
        paths: The paths; several can lead to the same object.
        class_names: For each path the names of the class and bases of the object there; None if no pattern has
            `:Name`.
    """

    def __init__(self, paths: Sequence[Path], class_names: Sequence[Sequence[str]] | None = None) -> None:
        self.paths = list(paths)
        self.class_names = [()] * len(self.paths) if class_names is None else list(class_names)
        self._joined_paths = [_join_path(path) for path in self.paths]

    @functools.cached_property
    def lengths(self) -> dict[Path, int]:
        """Length of the sequence at each path that has integer children."""
        lengths: dict[Path, int] = {}
        for path in self.paths:
            for depth, segment in enumerate(path):
                if isinstance(segment, int):
                    parent = path[:depth]
                    lengths[parent] = max(lengths.get(parent, 0), segment + 1)
        return lengths

    def match(self, pattern: Pattern) -> tuple[int, ...]:
        """Return the indices of the paths that match, in increasing order."""
        hits: set[int] = set()
        for alternative in _compile_pattern(pattern.text):
            hits.update(self._match_alternative(alternative))
        return tuple(sorted(hits))

    def _match_alternative(self, alternative: _Alternative) -> Iterator[int]:
        if alternative.regex is None:
            for index, path in enumerate(self.paths):
                if alternative.is_match(path, self.class_names[index], self.lengths):
                    yield index
            return
        full, cls = alternative.regex.fullmatch, alternative.cls
        for index, text in enumerate(self._joined_paths):
            if full(text) and (cls is None or any(map(cls.fullmatch, self.class_names[index]))):
                yield index


def match(
    pattern: Pattern, paths: Sequence[Path], class_names: Sequence[Sequence[str]] | None = None
) -> tuple[int, ...]:
    """Return the indices of the paths that match; for many patterns, build a `PathIndex` once.

    Args:
        pattern: The pattern.
        paths: The paths.
        class_names: For each path the names of the class and bases of the object there.

    Example:
        >>> match(Pattern("layers.*"), [("layers", 0), ("layers", 1), ("head",)])
        (0, 1)
    """
    return PathIndex(paths, class_names).match(pattern)


def find_closest(pattern: Pattern | str, paths: Sequence[Path], limit: int = 3) -> tuple[str, ...]:
    """Return the existing paths that resemble a pattern most, formatted; for the `fix` of an error.

    Args:
        pattern: A pattern that matched nothing.
        paths: The existing paths.
        limit: How many to return at most.
    """
    text = pattern if isinstance(pattern, str) else pattern.text
    text = text.rpartition(":")[0] or text
    # Layers of equal structure differ in their index only, so one of each kind is enough.
    representatives: dict[str, str] = {}
    for path in paths:
        if path:
            folded = ".".join("*" if isinstance(segment, int) else segment for segment in path)
            representatives.setdefault(folded, format_path(path))
    if "." not in text:
        last = {folded.rpartition(".")[2]: folded for folded in reversed(representatives)}
        near = [last[name] for name in difflib.get_close_matches(text, last, n=limit, cutoff=0.4)]
    else:
        near = difflib.get_close_matches(re.sub(r"\[[^]]*\]|\d+", "*", text), representatives, n=limit, cutoff=0.4)
    return tuple(representatives[folded] for folded in near)


@dataclasses.dataclass(frozen=True)
class NamePattern:
    """A pattern over the names of values inside a region.

    `path`, `path[i]`: the output of a submodule; `path:primitive`, `path:primitive[i]`:
    the result of an operation there; `path:input`, `path:input[i]`: an array passed to it;
    `@name`: a `checkpoint_name` of the model's author.
    The path is a `Pattern` relative to the region; an empty one means the region itself.

    Attributes:
        text: The pattern as written.

    Example:
        >>> NamePattern("attn:exp").is_match("op", ("attn",), "exp", 0)
        True
    """

    text: str

    def __post_init__(self) -> None:
        _compile_name(self.text)

    @classmethod
    def parse(cls, text: str) -> "NamePattern":
        """Return the name pattern that a string stands for.

        Args:
            text: The pattern as written.

        Raises:
            PatternError: If the string has a syntax error.
        """
        return cls(text)

    def is_match(self, kind: str, path: Path, primitive: str, index: int) -> bool:
        """Return whether the pattern matches a value.

        Args:
            kind: "module" for the output of a module, "input" for an array passed to one, "op" for the result of an
                operation, "user" for a `checkpoint_name`.
            path: Module of the value, relative to the region.
            primitive: Name of the primitive or of the `checkpoint_name`, or "input"; "" for a module's output.
            index: Position in trace order among the values of equal name.
        """
        expected_kind, path_pattern, glob, expected_index = _compile_name(self.text)
        if kind != expected_kind or (expected_index is not None and expected_index != index):
            return False
        if glob is not None and not glob.fullmatch(primitive):
            return False
        return path_pattern is None or path_pattern.is_match(path)


@functools.lru_cache(maxsize=4096)
def _compile_name(text: str) -> tuple[str, Pattern | None, re.Pattern[str] | None, int | None]:
    if not isinstance(text, str) or not text.strip():
        raise _make_pattern_error(text, "it is empty", 'a name such as "attn.qkv", "mlp:dot_general" or "@my_name".')
    indexed = _INDEX.match(text)
    body, number = (indexed["rest"], int(indexed["index"])) if indexed else (text, None)
    if body.startswith("@"):
        return "user", None, _compile_glob(body[1:], text), number
    path, colon, primitive = _split_colon(body)
    if not colon:
        return "module", Pattern(path), None, number
    if not primitive:
        raise _make_pattern_error(
            text, "nothing follows the colon", f'"{path}:*" for every operation in {path or "."}.'
        )
    # Inputs match this word alone: what a region is passed is saved anyway, so `.:*` does not mean it.
    kind = "input" if primitive == "input" else "op"
    return kind, Pattern(path or "."), _compile_glob(primitive, text), number


@functools.lru_cache(maxsize=4096)
def _compile_pattern(text: str) -> tuple[_Alternative, ...]:
    if not text.strip():
        raise _make_pattern_error(text, "it is empty", '"." for the root, "**" for everything.')
    if text != text.strip() or any(character in text for character in "\n\t" + _SEPARATOR):
        raise _make_pattern_error(
            text, "it starts or ends with white space, or contains control characters", f"{text.strip()!r}."
        )
    return tuple(_compile_alternative(expanded, text) for expanded in _expand_braces(text, text))


def _compile_alternative(expanded: str, text: str) -> _Alternative:
    body, colon, cls = _split_colon(expanded)
    if colon and not cls:
        raise _make_pattern_error(text, "nothing follows the colon", f'"{body}" for any class, or "{body}:Linear".')
    tokens = tuple(_tokenize(body, text))
    has_slice = any(isinstance(token, slice | int) for token in tokens)
    return _Alternative(
        tokens=tokens,
        regex=None if has_slice else re.compile("".join(map(_make_regex, tokens))),
        cls=_compile_glob(cls, text) if colon else None,
    )


def _split_colon(text: str) -> tuple[str, str, str]:
    """Split at the last colon outside of a slice, as `rpartition` does."""
    head, colon, tail = text.rpartition(":")
    return (text, "", "") if not colon or "]" in tail else (head, colon, tail)


def _tokenize(body: str, text: str) -> Iterator[_Token]:
    if body == ".":
        return
    if body in ("", "**"):  # "" if the pattern is a class name only
        yield "**"
        return
    segments = body.split(".")
    if len(segments) == 1:
        yield "**"
    for segment in segments:
        if segment == "**":
            yield "**"
        elif segment.startswith("["):
            yield _parse_slice(segment, text)
        elif not segment:
            raise _make_pattern_error(
                text, "two dots enclose an empty segment", '"**" to match any number of segments.'
            )
        else:
            yield _compile_glob(segment, text)


def _parse_slice(segment: str, text: str) -> slice | int:
    parsed = _SLICE.fullmatch(segment)
    if parsed is None or (not parsed[2] and not parsed[1]):
        raise _make_pattern_error(
            text, f"{segment!r} is not a slice", '"[0]", "[-1]", "[:-2]" or "[::2]" as a whole segment.'
        )
    if not parsed[2]:
        return int(parsed[1])
    start, stop, step = (int(part) if part else None for part in (parsed[1], parsed[3], parsed[4]))
    if step == 0:
        raise _make_pattern_error(text, "a slice cannot step by 0", '"[::2]" for every second.')
    return slice(start, stop, step)


def _compile_glob(segment: str, text: str) -> re.Pattern[str]:
    if any(character in segment for character in "[]{}"):
        raise _make_pattern_error(
            text, "there are brackets inside a segment", "a slice as a whole segment: layers.[0]."
        )
    if "**" in segment:
        raise _make_pattern_error(
            text, "** is combined with other characters", "** as a whole segment: encoder.**.attn."
        )
    return re.compile(re.escape(segment).replace(r"\*", f"[^{_SEPARATOR}]*"))


def _make_regex(token: _Token) -> str:
    if isinstance(token, str):
        return f"(?:{_SEPARATOR}[^{_SEPARATOR}]*)*"
    assert isinstance(token, re.Pattern)
    return _SEPARATOR + token.pattern


def _join_path(path: Path) -> str:
    return "".join(_SEPARATOR + str(segment) for segment in path)


def _is_match_from(tokens: tuple[_Token, ...], path: Path, depth: int, lengths: Mapping[Path, int]) -> bool:
    """Match `tokens` against `path` from `depth` on; a regex cannot, if slices depend on lengths."""
    if not tokens:
        return depth == len(path)
    token, rest = tokens[0], tokens[1:]
    if isinstance(token, str):
        return any(_is_match_from(rest, path, end, lengths) for end in range(depth, len(path) + 1))
    if depth == len(path) or not _is_token_match(token, path, depth, lengths):
        return False
    return _is_match_from(rest, path, depth + 1, lengths)


def _is_token_match(token: _Token, path: Path, depth: int, lengths: Mapping[Path, int]) -> bool:
    segment = path[depth]
    if isinstance(token, re.Pattern):
        return token.fullmatch(str(segment)) is not None
    if not isinstance(segment, int):
        return False
    length = lengths.get(path[:depth], segment + 1)
    if isinstance(token, slice):
        return segment in range(*token.indices(length))
    assert isinstance(token, int)
    return segment == (token if token >= 0 else token + length)


def _expand_braces(text: str, pattern: str) -> list[str]:
    """Return the strings that `text` stands for, without braces."""
    start = text.find("{")
    if start < 0:
        if "}" in text:
            raise _make_pattern_error(pattern, "it closes a brace that is not open", "{a,b} around the alternatives.")
        return [text]
    depth, parts, begin = 0, [], start + 1
    for position in range(start, len(text)):
        character = text[position]
        depth += (character == "{") - (character == "}")
        if depth == 0 or (depth == 1 and character == ","):
            parts.append(text[begin:position])
            begin = position + 1
        if depth == 0:
            break
    else:
        raise _make_pattern_error(pattern, "it opens a brace and does not close it", "{a,b} around the alternatives.")
    tails = _expand_braces(text[position + 1 :], pattern)
    heads = [text[:start] + inner for part in parts for inner in _expand_braces(part, pattern)]
    if len(heads) * len(tails) > _MAX_BRACE_ALTERNATIVES:
        raise _make_pattern_error(
            pattern, f"its braces stand for more than {_MAX_BRACE_ALTERNATIVES} alternatives", "several rules, or a *."
        )
    return [head + tail for head in heads for tail in tails]


def _make_pattern_error(text: object, problem: str, fix: str) -> PatternError:
    return PatternError(
        what=f"{text!r} is not a pattern: {problem}.", why="as written it would match nothing.", fix=fix
    )
