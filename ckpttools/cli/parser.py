# SPDX-License-Identifier: Apache-2.0
"""What the command line `ckpttools` accepts: its commands, their options, and the exit codes."""

import argparse
import pathlib
from typing import Any

EXIT_OK, EXIT_NO, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PIPE_CLOSED = 0, 1, 2, 130, 141
"""0: done; 1: the answer is no; 2: failed, also argparse's code for bad usage; 130: Ctrl-C; 141: the reader of the
output left before the end, as in `| head -1`. The last two are what a shell reports for the signals SIGINT and SIGPIPE.
"""


class _CommandParser(argparse.ArgumentParser):
    """The parser of one command: options may stand between its arguments, also before an optional one."""

    _is_parsing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments after the command's name; called by the parser of the whole line."""
        if self._is_parsing:  # `parse_known_intermixed_args` calls this method for each of its two passes.
            return super().parse_known_args(args, namespace)
        self._is_parsing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_parsing = False


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all commands and their options."""
    parser = argparse.ArgumentParser(
        prog="ckpttools",
        description="List, verify, compare, repair and copy the checkpoints of a run.",
        epilog="Exit codes: 0 done; 1 damaged, different or beyond repair; 2 failed; "
        "141 the reader of the output left before its end.",
    )
    of_step = "directory of a run or of one step (runs/exp1/500), or the address of a mirror"
    of_local_step = "directory of the run or of one step (runs/exp1/500)"
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_CommandParser)

    def add_command(name: str, summary: str, run_help: str = "directory of the run") -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        added.add_argument("run", type=parse_location if run_help == of_step else pathlib.Path, help=run_help)
        added.add_argument("--json", action="store_true", help="machine-readable output")
        return added

    listed = add_command("ls", "list the steps with metrics, sizes and branches", of_step)
    listed.add_argument("--verify", action="store_true", help="read every byte and report which steps are intact")
    for name, text in (
        ("show", "show the tree of a step (default: the newest) with shapes, dtypes and bytes"),
        ("verify", "read every byte and name what is damaged; change nothing"),
    ):
        add_command(name, text, of_step).add_argument("step", nargs="*", help="number of a step of the run")
    differing = add_command("diff", "compare the structure and values of two steps", of_step)
    differing.add_argument(
        "other", nargs="+", help="numbers of one or two steps of the run, or directory of another run or step"
    )
    pruned = add_command("prune", "delete the steps that a retention does not keep")
    pruned.add_argument("--dry-run", action="store_true", help="only print what would be deleted, and why")
    pruned.add_argument(
        "--spec", type=pathlib.Path, metavar="TOML", help="read `keep` from the [checkpoint] table of this file"
    )
    pruned.add_argument("--latest", type=int, metavar="N", help="keep the N latest")
    pruned.add_argument(
        "--best", action="append", default=[], metavar="METRIC:MODE[:N]", help="keep the N best, such as val_loss:min:2"
    )
    pruned.add_argument("--every-steps", type=int, metavar="N", help="keep the multiples of N")
    pruned.add_argument(
        "--quarantine",
        action="store_true",
        help="delete the damaged steps in quarantine, too; alone, delete only those",
    )
    for name, text in (("pin", "protect steps from retention"), ("unpin", "let retention delete pinned steps again")):
        add_command(name, text, of_local_step).add_argument(
            "steps", nargs="*", metavar="step", help="number of a step of the run, or directory of one"
        )
    recorded = add_command(
        "record", "add metrics to a committed step, even while another process trains", of_local_step
    )
    recorded.add_argument(
        "metrics",
        nargs="+",
        metavar="NAME=VALUE",
        help="a metric, such as val_loss=0.5; before it the number of the step, if the directory is that of the run",
    )
    recorded.add_argument("--overwrite", action="store_true", help="replace recorded values")
    repaired = add_command("repair", "restore damaged manifests and metadata from their second copies")
    repaired.add_argument("--dry-run", action="store_true", help="only print what would be done")
    exported = add_command("export", "write a step's weights to a safetensors file", of_step)
    exported.add_argument("file", type=pathlib.Path, help="safetensors file")
    _add_exchange_options(exported, "item of the step")
    exported.add_argument("--meta", action="append", default=[], metavar="NAME=TEXT", help="metadata for the header")
    imported = add_command("import", "create a run whose first step holds the weights of a safetensors file")
    imported.add_argument("file", type=pathlib.Path, help="safetensors file")
    imported.add_argument("--step", type=int, default=1, help="number of the step")
    _add_exchange_options(imported, "name of the item")
    mirrored = add_command("mirror", "copy the steps that a mirror lacks; --dry-run only compares")
    mirrored.add_argument("url", nargs="?", help="address of the mirror, unless --spec names one")
    mirrored.add_argument(
        "--spec", type=pathlib.Path, metavar="TOML", help="read `mirror` from the [checkpoint] table of this file"
    )
    mirrored.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="option of the store; no secrets"
    )
    mirrored.add_argument("--check", action="store_true", help="read every byte there, and replace damaged copies")
    mirrored.add_argument("--dry-run", action="store_true", help="only print what would be done")
    mirrored.add_argument(
        "--fetch", nargs="?", const="latest", metavar="STEP", help="fetch a step from the mirror instead"
    )
    adopted = add_command("adopt", "adopt checkpoints of Orbax or flax", "directory of the checkpoints, or one of them")
    adopted.add_argument(
        "--into", type=pathlib.Path, metavar="RUN", help="copy them to this run; do not change their directory"
    )
    adopted.add_argument("--step", type=int, help="number of the step of a single checkpoint; requires --into")
    adopted.add_argument("--dry-run", action="store_true", help="only print what would be adopted")
    return parser


def parse_location(text: str) -> str | pathlib.Path:
    """Return a path, or the unchanged address of a mirror, since `Path` would remove one of its slashes."""
    return text if "://" in text else pathlib.Path(text)


def _add_exchange_options(parser: argparse.ArgumentParser, item_help: str) -> None:
    parser.add_argument("--item", default="model", help=item_help)
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="LEAF=TENSOR",
        help="name of a tensor, such as 'layers.*.kernel=h.*.weight'",
    )
    parser.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="omit matching leaves")
