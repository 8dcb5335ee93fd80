# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other writers are recognised by what those writers leave on the disk."""

import json

import pytest

from ckpttools.store.formats import foreign_layouts
from tests.ckpttools.store.writers import RUNS, SINGLES, write, write_unfinished

LAYOUTS = {"standard": "bare", "pytree": "bare", "flax, Orbax": "bare", "flax": "msgpack"}


@pytest.mark.parametrize("name", ["manager, both", "standard, named", "pytree", "flax", "flax, Orbax"])
def test_the_steps_of_a_writer_are_recognised(tmp_path, name):
    write(RUNS[name], tmp_path)
    found = foreign_layouts.find_foreign_files(tmp_path)
    assert [step for step, _ in found.steps] == [10, 20]
    expected = LAYOUTS.get(name, LAYOUTS.get(name.partition(",")[0], "items"))
    assert {foreign_layouts.recognize(path) for _, path in found.steps} == {expected}
    assert found.unnumbered == found.unfinished == ()


def test_an_unnumbered_checkpoint_is_recognised(tmp_path):
    path = write(SINGLES["standard"], tmp_path / "best")
    assert foreign_layouts.find_foreign_files(tmp_path).unnumbered == (path,)


def test_an_unfinished_checkpoint_is_not_a_step(tmp_path):
    write_unfinished(tmp_path / "run")
    found = foreign_layouts.find_foreign_files(tmp_path / "run")
    assert (found.steps, found.unnumbered) == ((), ())
    assert [path.name for path in found.unfinished] == ["10.orbax-checkpoint-tmp"]
    # As on a store without a rename: the same files under the final name.
    found.unfinished[0].rename(tmp_path / "run" / "step_10")
    assert foreign_layouts.recognize(tmp_path / "run" / "step_10") is None
    metadata = tmp_path / "run" / "step_10" / foreign_layouts.ORBAX_METADATA
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"commit_timestamp_nsecs": 1}))
    assert foreign_layouts.recognize(tmp_path / "run" / "step_10") == "items", "control"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("events_10", b"plain text"),
        ("log_10", b""),
        ("data_10", b"\x93NUMPY\x01"),
        ("picture_10", b"\x89PNG\r\n"),
        ("words_10", "ހށ".encode()),
        ("checkpoint_10", b"\x80"),
    ],
)
def test_other_numbered_files_are_not_checkpoints(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert foreign_layouts.find_foreign_files(tmp_path) == foreign_layouts.ForeignFiles()


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("000010", 10),
        ("00", 0),
        ("ckpt_7", 7),
        ("a_b_0012", 12),
        ("best", None),
        ("checkpoint_7.5", None),
        ("10", 10),
        (".a_3", None),
        ("v1.2_30", 30),
    ],
)
def test_the_number_is_the_end_of_the_name(name, step):
    assert foreign_layouts.parse_number(name) == step


def test_a_step_of_flax_with_a_fraction_has_no_number(tmp_path):
    write(lambda path: RUNS["flax"](path), tmp_path)
    (tmp_path / "checkpoint_20").rename(tmp_path / "checkpoint_20.5")
    found = foreign_layouts.find_foreign_files(tmp_path)
    assert [path.name for path in found.unnumbered] == ["checkpoint_20.5"]
    assert [step for step, _ in found.steps] == [10]
