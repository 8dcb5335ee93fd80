# SPDX-License-Identifier: Apache-2.0
"""The pages of the documentation as promises: each fenced block has a way to prove it, each name a place.

A page's Python blocks share their names, as a reader would have them. What a `text` block behind one shows is what that
block prints; a `console` block shows commands and what they print. A language that nothing here knows is an error, so
that no block goes unproved.
"""

import argparse
import ast
import contextlib
import dataclasses
import inspect
import io
import pathlib
import re
import shlex
import tomllib
import warnings
from collections.abc import Iterator

import ckpttools
import ckpttools.cli.commands
import remattools
import remattools.cli.commands

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGES = {"ct": ckpttools, "rt": remattools}

_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^`\n]*)\n(?P<body>.*?)^(?P=indent)``` *$", re.DOTALL | re.MULTILINE)
_MARK = re.compile(r"^ *(```|~~~)", re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
# What differs from run to run and says nothing: a date, a branch's name, a file's name, the bytes of a store's files.
_PASSING = (
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"), "DATE"),
    (re.compile(r"\b[0-9a-f]{32}\b"), "FILE"),
    (re.compile(r"\b[0-9a-f]{8}\b"), "BRANCH"),
    (re.compile(r"\b\d+\.\d [KM]iB"), "SIZE"),
    (re.compile(r"[ \t]+"), " "),
)


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, and its first line's number in the page."""

    language: str
    text: str
    line: int
    follows: bool
    """Whether nothing but blank lines stands between it and the block before."""


class PageError(AssertionError):
    """A page says what is not so."""


def blocks_of(text: str) -> list[Block]:
    """Every fenced block, also indented ones.

    Raises:
        PageError: If a fence was opened or closed in a way that is not understood here, which would hide a block.
    """
    found, end = [], 0
    for fence in _FENCE.finditer(text):
        indent, body = fence["indent"], fence["body"]
        found.append(
            Block(
                language=fence["info"].strip(),
                text="".join(line.removeprefix(indent) for line in body.splitlines(keepends=True)),
                line=text.count("\n", 0, fence.start("body")) + 1,
                follows=bool(found) and not text[end : fence.start()].strip(),
            )
        )
        end = fence.end()
    if len(_MARK.findall(text)) != 2 * len(found):
        raise PageError(f"{len(_MARK.findall(text))} fences and {len(found)} blocks: one of them is not understood")
    return found


def prove(page: pathlib.Path, text: str | None = None) -> None:
    """Run, read or parse every block of a page, in its order and in the present folder.

    Raises:
        PageError: If a block shows what is not so, or nothing can prove it.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    printed: str | None = None
    for block in blocks_of(page.read_text() if text is None else text):
        place = f"{page.name}:{block.line}"
        last, printed = printed, None
        match block.language:
            case "python":
                printed = _run(block, page, names)
            case "text" if block.follows and last is not None:
                _compare(block.text, last, place)
            case "console":
                _run_commands(block.text, place)
            case "toml":
                _read(block.text, place)
            case "sh":
                for line in block.text.splitlines():
                    _check_command(shlex.split(line, comments=True), place)
            case "py":
                compile(block.text, place, "exec")
            case language:
                raise PageError(f"{place}: nothing proves a block of {language or 'no language'}")


def _run(block: Block, page: pathlib.Path, names: dict[str, object]) -> str:
    stream = io.StringIO()
    # Blank lines in front, so that a traceback names the line of the page.
    program = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
    with contextlib.redirect_stdout(stream), warnings.catch_warnings():
        # Advice that depends on how busy the machine is; every other warning is an error here as elsewhere.
        warnings.filterwarnings("ignore", "saving took", ckpttools.CheckpointWarning)
        exec(program, names)
    return stream.getvalue()


def _compare(shown: str, printed: str, place: str) -> None:
    def essence(text: str) -> list[str]:
        for pattern, word in _PASSING:
            text = pattern.sub(word, text)
        return [line.strip() for line in text.strip().splitlines()]

    if essence(shown) != essence(printed):
        raise PageError(f"{place} shows\n{shown}\nand what is printed is\n{printed}")


def _run_commands(text: str, place: str) -> None:
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        program, *arguments = shlex.split(command, comments=True)
        main = {"ckpttools": ckpttools.cli.commands.main, "remattools": remattools.cli.commands.main}[program]
        stream = io.StringIO()
        with contextlib.redirect_stdout(stream):
            main(arguments)
        _compare(shown, stream.getvalue(), place)


def _read(text: str, place: str) -> None:
    tables = tomllib.loads(text).keys()
    readers = {
        "remat": remattools.Rules.from_toml,
        "checkpoint": ckpttools.CheckpointSpec.from_toml,
        "surgery": ckpttools.Surgery.from_toml,
    }
    if unknown := tables - readers.keys():
        raise PageError(f"{place}: nothing reads {sorted(unknown)}")
    for name in tables:
        readers[name](text)


def _check_command(words: list[str], place: str) -> None:
    """Whether a command of ours would take these words, and what stands around it is there."""
    match words:
        case []:
            pass
        case ["make", target]:
            if not re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
                raise PageError(f"{place}: there is no target {target}")
        case ["pip", "install", "-e", "."]:
            pass
        case [("ckpttools" | "remattools") as program, *arguments]:
            build = {
                "ckpttools": ckpttools.cli.commands.build_parser,
                "remattools": remattools.cli.commands.build_parser,
            }[program]
            try:
                build().parse_args(arguments)
            except (SystemExit, argparse.ArgumentError) as error:
                raise PageError(f"{place}: {shlex.join(words)} is refused") from error
        case _:
            raise PageError(f"{place}: nothing proves the command {shlex.join(words)}")


def missing_names(text: str) -> list[str]:
    """What a page speaks of in code and is not there: names of the packages, parameters, files of the repository."""
    return [problem for code in _INLINE.findall(text) for problem in (*_missing_files(code), *_missing_api(code))]


def _missing_files(code: str) -> Iterator[str]:
    if (
        re.fullmatch(r"(?:tests|benchmarks|examples|docs|remattools|ckpttools)/[\w./-]*", code)
        and not (ROOT / code).exists()
    ):
        yield f"{code}: no such file"


def _missing_api(code: str) -> Iterator[str]:
    for short, name in re.findall(r"\b(ct|rt)\.([A-Za-z]\w*)", code):
        if not hasattr(PACKAGES[short], name):
            yield f"{short}.{name}: no such name"
    try:
        tree = ast.parse(code.replace("\\|", "|"), mode="eval")
    except SyntaxError:
        return
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = _public(call.func)
        if function is None:
            continue
        parameters = inspect.signature(function).parameters
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        for keyword in call.keywords:
            if keyword.arg is not None and keyword.arg not in parameters and not open_ended:
                yield f"{code}: no parameter {keyword.arg}"


def _public(function: ast.expr) -> object | None:
    """The function or class of ours that an expression means: `ct.open`, or a class by its bare name."""
    match function:
        case ast.Attribute(value=ast.Name(id=("ct" | "rt") as short), attr=name):
            return getattr(PACKAGES[short], name, None)
        case ast.Name(id=name) if name[0].isupper():
            return next((vars(package)[name] for package in PACKAGES.values() if name in vars(package)), None)
    return None
