# SPDX-License-Identifier: Apache-2.0
"""What the command line accepts."""

import pytest

from remattools.cli import commands, parser


def test_every_command_of_the_parser_has_an_implementation():
    names = {"explain", "residuals", "timeline", "measure", "compare", "plan", "check"}
    assert commands._COMMANDS.keys() == names
    for name in names:
        assert parser.build_parser().parse_args([name, "train.py:factory"]).command == name


def test_defaults_of_plan():
    args = parser.build_parser().parse_args(["plan", "train.py:factory", "--budget", "12GiB"])
    assert (args.budget, args.of, args.max_compiles, args.as_is, args.out) == ("12GiB", "peak", 8, False, None)


def test_rules_of_compare_can_be_repeated():
    args = parser.build_parser().parse_args(["compare", "train.py:factory", "--rules", "a", "--rules", "b=c"])
    assert args.rules == ["a", "b=c"]


@pytest.mark.parametrize(
    "arguments", [[], ["measure"], ["measure", "a:b", "--bogus"], ["plan", "a:b", "--of", "host"], ["bogus", "a:b"]]
)
def test_bad_usage_exits_with_the_code_of_a_failure(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        parser.build_parser().parse_args(arguments)
    assert caught.value.code == parser.EXIT_FAILED
    assert "usage: remattools" in capsys.readouterr().err
