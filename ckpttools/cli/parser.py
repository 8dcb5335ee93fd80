# SPDX-License-Identifier: Apache-2.0
"""What the command line `ckpttools` accepts: its commands and their options, and nothing of what they do."""

import argparse
import pathlib


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = argparse.ArgumentParser(
        prog="ckpttools",
        description="What a run's checkpoints are, whether they are intact, and what can be done about it.",
        epilog="Exit codes: 0 done, 1 the answer is no (damaged, different, beyond repair), 2 cannot be done.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add_command(name: str, summary: str, run_help: str = "the run's folder") -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        added.add_argument("run", type=pathlib.Path, help=run_help)
        added.add_argument("--json", action="store_true", help="machine-readable output")
        return added

    of_step = "the run's folder, or one step's (runs/exp1/500)"
    listed = add_command("ls", "list the steps with metrics, sizes and branches")
    listed.add_argument("--verify", action="store_true", help="read every byte and say which steps are intact")
    add_command("show", "show the tree of a step, by default the newest, with shapes, dtypes and bytes", of_step)
    add_command("verify", "read every byte and name what is damaged; changes nothing", of_step)
    differing = add_command("diff", "compare two steps: structure, and the largest changes of values", of_step)
    differing.add_argument("other", type=pathlib.Path, help="another run's folder, or step's; or a step's number here")
    pruned = add_command("prune", "delete what a retention does not keep")
    pruned.add_argument("--dry-run", action="store_true", help="only say what would be deleted, and why")
    pruned.add_argument(
        "--spec", type=pathlib.Path, metavar="TOML", help="take keep from the [checkpoint] of this file"
    )
    pruned.add_argument("--latest", type=int, metavar="N", help="keep the N latest")
    pruned.add_argument(
        "--best", action="append", default=[], metavar="METRIC:MODE[:N]", help="keep the N best, as in val_loss:min:2"
    )
    pruned.add_argument("--every-steps", type=int, metavar="N", help="keep the multiples of N")
    pruned.add_argument(
        "--quarantine",
        action="store_true",
        help="also, or only, delete the damaged steps that were moved out of the way",
    )
    for name, text in (("pin", "protect steps from retention"), ("unpin", "give steps back to retention")):
        add_command(name, text).add_argument("steps", type=int, nargs="+")
    repaired = add_command("repair", "put damaged manifests and metadata back from their second copies")
    repaired.add_argument("--dry-run", action="store_true", help="only say what would be done")
    exported = add_command("export", "write a step's weights into a safetensors file", of_step)
    exported.add_argument("file", type=pathlib.Path, help="the safetensors file")
    _add_exchange_options(exported, "which item of the step")
    exported.add_argument("--meta", action="append", default=[], metavar="NAME=TEXT", help="a text for the header")
    imported = add_command("import", "make a run whose first step are the weights of a safetensors file")
    imported.add_argument("file", type=pathlib.Path, help="the safetensors file")
    imported.add_argument("--step", type=int, default=1, help="the number of the step")
    _add_exchange_options(imported, "the name of the item")
    mirrored = add_command("mirror", "copy what a mirror lacks; --dry-run only compares")
    mirrored.add_argument("url", nargs="?", help="the mirror's address, unless --spec names one")
    mirrored.add_argument("--spec", type=pathlib.Path, metavar="TOML", help="take mirror from the [checkpoint] of it")
    mirrored.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the store; no secrets"
    )
    mirrored.add_argument("--check", action="store_true", help="read every byte there, and mend what is damaged")
    mirrored.add_argument("--dry-run", action="store_true", help="only say what would be done")
    mirrored.add_argument("--fetch", nargs="?", const="latest", metavar="STEP", help="bring a step from there instead")
    adopted = add_command("adopt", "take over steps that plain Orbax wrote")
    adopted.add_argument("--dry-run", action="store_true", help="only say which")
    return parser


def _add_exchange_options(parser: argparse.ArgumentParser, item_help: str) -> None:
    parser.add_argument("--item", default="model", help=item_help)
    parser.add_argument(
        "--name", action="append", default=[], metavar="LEAF=TENSOR", help="as in 'layers.*.kernel=h.*.weight'"
    )
    parser.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="leave these leaves out")
