# SPDX-License-Identifier: Apache-2.0
"""Exit codes and messages of the commands: an empty, a missing and a live run, damage, an interrupt."""

import os
import pathlib
import runpy
import subprocess
import sys

import pytest

import ckpttools as ct
from ckpttools.cli import main, parser, run_commands
from tests.ckpttools.cli.commands import call, damage, spec_for, state_at


def test_an_empty_and_a_missing_directory(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    code, out, err = call(capsys, "ls", tmp_path / "run")
    assert (code, out) == (parser.EXIT_NO, "no steps\n")
    assert "is an empty directory" in err
    code, out, _ = call(capsys, "verify", tmp_path / "run")
    assert (code, out) == (parser.EXIT_NO, f"no steps: {tmp_path / 'run'} is an empty directory.\n")
    assert call(capsys, "prune", tmp_path / "run", "--latest", 2, "--dry-run")[:2] == (
        parser.EXIT_OK,
        "no steps\n",
    )
    code, _, err = call(capsys, "show", tmp_path / "run")
    assert code == parser.EXIT_FAILED
    assert "no readable step" in err
    assert not list((tmp_path / "run").iterdir()), "a look leaves nothing behind"
    for command in ("ls", "show", "verify", "repair"):
        code, _, err = call(capsys, command, tmp_path / "nothing")
        assert code == parser.EXIT_FAILED
        assert "does not exist" in err


def test_metadata_of_plain_orbax_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "_CHECKPOINT_METADATA").write_text("[")
    code, _, err = call(capsys, "show", tmp_path)
    assert code == parser.EXIT_FAILED
    assert "the metadata of step 3 cannot be read" in err


def test_a_live_run_can_be_looked_at_and_not_changed(run, capsys):
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(state_at(0))
        ckpt.steps(99)
        for argv in (["ls"], ["show"], ["verify"], ["prune", "--latest", "1", "--dry-run"], ["repair", "--dry-run"]):
            assert call(capsys, argv[0], run, *argv[1:])[0] == parser.EXIT_OK, argv
        for argv in (["prune", "--latest", "1"], ["repair"]):
            code, _, err = call(capsys, argv[0], run, *argv[1:])
            assert code == parser.EXIT_FAILED
            assert "is being written by process" in err
        assert call(capsys, "pin", run, 10)[0] == parser.EXIT_OK
        ckpt.save(40, state_at(40))
    assert "pinned" in call(capsys, "ls", run)[1]


def test_the_installed_command_and_a_reader_who_leaves_early(run):
    command = f"{pathlib.Path(sys.executable).parent / 'ckpttools'} show {run} | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout.startswith("step 30: committed")
    assert result.returncode in (parser.EXIT_OK, parser.EXIT_PIPE_CLOSED), "the output may fit into the pipe"
    assert result.stderr == ""


def run_without_reader(*argv, stream="stdout", where=None):
    """Return the exit code, and what the command prints to its other stream; its output is buffered."""
    source, sink = os.pipe()
    os.close(source)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: where or sink}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-m", "ckpttools", *map(str, argv)], text=True, env=environment, **streams)
    os.close(sink)
    return done.returncode, (done.stderr if stream == "stdout" else done.stdout)


@pytest.mark.parametrize(
    "argv",
    [["verify", "RUN"], ["verify", "RUN", "--json"], ["ls", "RUN", "--verify"], ["show", "RUN/20"]],
    ids=" ".join,
)
def test_a_reader_who_left_never_turns_damage_into_success(run, argv):
    damage(run, 30)
    argv = [each.replace("RUN", str(run)) for each in argv]
    assert run_without_reader(*argv) == (parser.EXIT_PIPE_CLOSED, "")


def test_errors_and_output_that_nobody_can_read_leave_no_traceback(run):
    assert run_without_reader("ls", run / "nothing", stream="stderr") == (parser.EXIT_PIPE_CLOSED, "")
    with open("/dev/full", "w") as full:
        code, printed = run_without_reader("ls", run, where=full)
    assert code == parser.EXIT_FAILED
    assert "No space left" in printed
    assert "Traceback" not in printed
    assert "Exception ignored" not in printed
    assert run_without_reader("ls", "--help") == (parser.EXIT_OK, ""), "help is not an answer about a run"


def test_the_module_is_the_command(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ckpttools", "verify", str(run)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("ckpttools", run_name="__main__")
    assert ended.value.code == parser.EXIT_OK
    with pytest.raises(SystemExit) as ended:
        main.main(["nonsense"])
    assert ended.value.code == parser.EXIT_FAILED
    assert "invalid choice" in capsys.readouterr().err


def test_an_interrupt_and_an_unreadable_disk_have_exit_codes(run, capsys, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied", "the disk")

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_commands, "ls", refuse)
    assert call(capsys, "ls", run)[::2] == (
        parser.EXIT_FAILED,
        "ckpttools: the disk cannot be read or written: Permission denied.\n",
    )
    monkeypatch.setattr(run_commands, "ls", interrupt)
    assert call(capsys, "ls", run)[0] == parser.EXIT_INTERRUPTED


def test_damage_that_stops_a_command_is_named_with_a_fix(run, tmp_path, capsys):
    damage(run, 30)
    code, _, err = call(capsys, "export", run, tmp_path / "x.safetensors")
    assert code == parser.EXIT_FAILED
    assert "damaged leaf: model." in err
    assert f"ckpttools verify {run}" in err
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0>&- 1>&- 2>&-"])
def test_a_closed_stream_discards_what_is_printed(run, closed):
    command = f"{sys.executable} -m ckpttools {{}} {closed}"
    for arguments, code in ((f"ls {run}", parser.EXIT_OK), (f"ls {run}/nothing", parser.EXIT_FAILED)):
        done = subprocess.run(["bash", "-c", command.format(arguments)], capture_output=True, text=True)
        assert done.returncode == code
        assert "Traceback" not in done.stderr
        assert not done.stdout or "1>&-" not in closed
        assert "ckpttools:" not in done.stdout, "an error is not printed to the other stream"
