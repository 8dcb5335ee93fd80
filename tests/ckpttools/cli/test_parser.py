# SPDX-License-Identifier: Apache-2.0
"""The commands that exist, and their options; no handler is run."""

import pathlib

import pytest

from ckpttools.cli import parser


def parse(*argv):
    return parser.build_parser().parse_args(argv)


@pytest.mark.parametrize(
    "command",
    ["ls", "show", "verify", "diff", "prune", "pin", "unpin", "repair", "export", "import", "mirror", "adopt"],
)
def test_each_command_takes_a_run_and_json(command):
    rest = {"diff": ["20"], "pin": ["20"], "unpin": ["20"], "export": ["file"], "import": ["file"]}.get(command, [])
    args = parse(command, "runs/exp1", *rest, "--json")
    assert (args.command, args.run, args.json) == (command, pathlib.Path("runs/exp1"), True)
    assert parse(command, "runs/exp1", *rest).json is False, "control"


def test_options_may_stand_between_the_arguments():
    for argv in (["run", "10", "20", "--json"], ["run", "--json", "10", "20"], ["--json", "run", "10", "20"]):
        args = parse("pin", *argv)
        assert (args.steps, args.json) == (["10", "20"], True)
    assert parse("pin", "run/10").steps == []


def test_fetch_without_a_step_means_the_newest():
    assert parse("mirror", "run", "url").fetch is None
    assert parse("mirror", "run", "url", "--fetch").fetch == "latest"
    assert parse("mirror", "run", "url", "--fetch", "500").fetch == "500"


def test_options_that_add_up_are_collected():
    args = parse("prune", "run", "--best", "loss:min", "--best", "accuracy:max", "--latest", "3")
    assert (args.best, args.latest) == (["loss:min", "accuracy:max"], 3)
    assert parse("prune", "run").best == []


@pytest.mark.parametrize("argv", [[], ["ls"], ["nonsense", "run"], ["ls", "run", "--all"]], ids=str)
def test_bad_usage_exits_with_the_code_of_a_failure(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*argv)
    assert ended.value.code == parser.EXIT_FAILED
    assert "usage: ckpttools" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["export", "import"])
def test_names_and_skipped_leaves_are_collected(command):
    args = parse(command, "run", "file", "--name", "a=b", "--name", "c=d", "--skip", "e", "--item", "net")
    assert (args.name, args.skip, args.item) == (["a=b", "c=d"], ["e"], "net")
    plain = parse(command, "run", "file")
    assert (plain.name, plain.skip, plain.item) == ([], [], "model")
