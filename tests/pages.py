# SPDX-License-Identifier: Apache-2.0
"""Check the documentation: every fenced block runs or parses, every shown output is real, every name exists.

The Python blocks of a page share one namespace, as for a reader who pastes them in order. A `text` block directly after
one shows exactly what that block prints. A `measured` block shows the same where numbers depend on the machine or the
compiler's version: numbers may differ, words and rows may not. A `console` block shows commands and what they print; a
`text` or `measured` block directly after it shows what its commands print that show nothing themselves. A `python`
block that begins with a file's name, `# train.py`, is also written into that file. A block for a TPU topology
(`tpu:v5e`) is only parsed where libtpu is not installed. An unknown language is an error, so that no block goes
unchecked.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib.util
import inspect
import io
import pathlib
import re
import shlex
import tomllib
import warnings
from collections.abc import Iterator

import ckpttools
import ckpttools.cli.main
import ckpttools.cli.parser
import remattools
import remattools.cli.main
import remattools.cli.parser

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGES = {"ct": ckpttools, "rt": remattools}

_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^`\n]*)\n(?P<body>.*?)^(?P=indent)``` *$", re.DOTALL | re.MULTILINE)
_MARK = re.compile(r"^ *(```|~~~)", re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
# Parts of an output that differ from run to run: dates, names of branches and files, sizes of a store's files.
_VOLATILE = (
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"), "DATE"),
    (re.compile(r"\b[0-9a-f]{32}\b"), "FILE"),
    (re.compile(r"\b[0-9a-f]{8}\b"), "BRANCH"),
    (re.compile(r"\b\d+\.\d [KM]iB"), "SIZE"),
    (re.compile(r"[ \t]+"), " "),
)
_FILE = re.compile(r"# ([\w.]+\.py)\n")
_TPU = re.compile(r"\btpu:v\w")
_NUMBERS = (
    (re.compile(r"\b\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)? (?:[KMGT]?i?B|[KMGT])\b"), "SIZE"),
    (re.compile(r"\b\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?"), "NUMBER"),
)


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        language: The word after the opening fence.
        text: The lines between the fences, without the block's indentation.
        line: Line number of the first line in the page, from 1.
        follows: Whether only blank lines separate it from the block before.
    """

    language: str
    text: str
    line: int
    follows: bool


class PageError(AssertionError):
    """A page shows something that is not true."""


def blocks_of(text: str) -> list[Block]:
    """Return every fenced block of a page, including indented ones.

    Raises:
        PageError: If a fence cannot be parsed, since that would hide a block.
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
        raise PageError(f"{len(_MARK.findall(text))} fences and {len(found)} blocks: one fence cannot be parsed")
    return found


def check_page(page: pathlib.Path, text: str | None = None) -> list[str]:
    """Run or parse every block of a page, in order, in the current directory.

    Args:
        page: The page's file; its name appears in errors.
        text: The page's text; read from the file by default.

    Returns:
        Places of the blocks that need libtpu and were only parsed.

    Raises:
        PageError: If a block shows something wrong, or cannot be checked.
    """
    has_libtpu = importlib.util.find_spec("libtpu") is not None
    parsed: list[str] = []
    previous = ""

    def is_output(block: Block | None) -> bool:
        return block is not None and block.follows and block.language in ("text", "measured")

    names: dict[str, object] = {"__name__": "__main__"}
    printed: str | None = None
    blocks = blocks_of(page.read_text() if text is None else text)
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        place = f"{page.name}:{block.line}"
        last, printed = printed, None
        if is_output(block) and parsed and parsed[-1] == previous:
            continue  # what a block would print that was only parsed
        previous = place
        if _TPU.search(block.text) and not has_libtpu and block.language in ("python", "console"):
            _parse(block, place)
            parsed.append(place)
            continue
        match block.language:
            case "python":
                if file := _FILE.match(block.text):
                    pathlib.Path(file[1]).write_text(block.text)
                printed = _run(block, page, names)
            case "text" if is_output(block) and last is not None:
                _compare(block.text, last, place)
            case "measured" if is_output(block) and last is not None:
                _compare(block.text, last, place, with_numbers=False)
            case "console":
                printed = _run_commands(block.text, place)
                if printed is not None and not is_output(following):
                    raise PageError(f"{place} does not show that it prints\n{printed}")
            case "toml":
                _read_toml(block.text, place)
            case "sh":
                for line in block.text.splitlines():
                    _check_command(shlex.split(line, comments=True), place)
            case "py":
                compile(block.text, place, "exec")
            case language:
                raise PageError(f"{place}: a block of {language or 'no language'} cannot be checked here")
    return parsed


def _parse(block: Block, place: str) -> None:
    """Check the form of a block that cannot run here."""
    if block.language == "python":
        try:
            compile(block.text, place, "exec")
        except SyntaxError as error:
            raise PageError(f"{place} does not parse: {error}") from error
        return
    for command, _ in _split_commands(block.text):
        _check_command(command, place)


def _run(block: Block, page: pathlib.Path, names: dict[str, object]) -> str:
    stream = io.StringIO()
    # Blank lines before it, so that a traceback shows the line of the page.
    program = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
    with contextlib.redirect_stdout(stream), warnings.catch_warnings():
        # This advice depends on how busy the machine is; every other warning is an error, as in all tests.
        warnings.filterwarnings("ignore", "saving took", ckpttools.CheckpointWarning)
        exec(program, names)
    return stream.getvalue()


def _compare(shown: str, printed: str, place: str, *, with_numbers: bool = True) -> None:
    """Compare two outputs without what differs from run to run, and without all numbers if asked."""

    def normalize(text: str) -> list[str]:
        for pattern, word in (*_VOLATILE, *(() if with_numbers else _NUMBERS)):
            text = pattern.sub(word, text)
        return [line.strip() for line in text.strip().splitlines()]

    if normalize(shown) != normalize(printed):
        raise PageError(f"{place} shows\n{shown}\nbut the block prints\n{printed}")


def _run_commands(text: str, place: str) -> str | None:
    """Run commands, and return what those print that show nothing; None if all show something or print nothing."""
    rest = ""
    for (program, *arguments), shown in _split_commands(text):
        main = {"ckpttools": ckpttools.cli.main.main, "remattools": remattools.cli.main.main}[program]
        stream = io.StringIO()
        with contextlib.redirect_stdout(stream):
            main(arguments)
        if shown.strip():
            _compare(shown, stream.getvalue(), place)
        else:
            rest += stream.getvalue()
    return rest or None


def _split_commands(text: str) -> Iterator[tuple[list[str], str]]:
    """Yield the words of each command, and what it shows."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.replace("\\\n", " ").partition("\n")
        yield shlex.split(command, comments=True), shown


def _read_toml(text: str, place: str) -> None:
    tables = tomllib.loads(text).keys()
    readers = {
        "remat": remattools.Rules.from_toml,
        "checkpoint": ckpttools.CheckpointSpec.from_toml,
        "surgery": ckpttools.Surgery.from_toml,
    }
    if unknown := tables - readers.keys():
        raise PageError(f"{place}: no reader for the tables {sorted(unknown)}")
    for name in tables:
        readers[name](text)


def _check_command(words: list[str], place: str) -> None:
    """Check that our command line accepts these words, or that the make target exists."""
    match words:
        case []:
            pass
        case ["make", target]:
            if not re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
                raise PageError(f"{place}: the Makefile has no target {target}")
        case ["pip", "install", "-e", "."]:
            pass
        case [("ckpttools" | "remattools") as program, *arguments]:
            build = {
                "ckpttools": ckpttools.cli.parser.build_parser,
                "remattools": remattools.cli.parser.build_parser,
            }[program]
            try:
                build().parse_args(arguments)
            except (SystemExit, argparse.ArgumentError) as error:
                raise PageError(f"{place}: {shlex.join(words)} is refused") from error
        case _:
            raise PageError(f"{place}: the command {shlex.join(words)} cannot be checked here")


def missing_names(text: str) -> list[str]:
    """List the code spans of a page that name a missing file, public name or parameter."""
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
    """Return the public function or class that an expression names: `ct.open`, or a class by its bare name."""
    match function:
        case ast.Attribute(value=ast.Name(id=("ct" | "rt") as short), attr=name):
            return getattr(PACKAGES[short], name, None)
        case ast.Name(id=name) if name[0].isupper():
            return next((getattr(package, name) for package in PACKAGES.values() if name in package.__all__), None)
    return None
