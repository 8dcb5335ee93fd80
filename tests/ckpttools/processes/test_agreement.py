# SPDX-License-Identifier: Apache-2.0
"""What is checked when a run is opened; `test_messages.py` opens runs with real processes."""

import pytest

import ckpttools as ct
from ckpttools.processes import agreement
from ckpttools.processes.messages import Group
from ckpttools.store.run_directory import RunDirectory


class SecondOfTwo(Group):
    """The second process, for which the leader prepares the given answer."""

    index = 1
    count = 2

    def __init__(self, answer):
        self.answer = answer

    def broadcast(self, topic, make, *, channel="main"):
        return self.answer


def open_as(group, spec, *, has_validation=False):
    agreement.open_run(group, RunDirectory(spec.directory), spec, has_validation=has_validation)


def test_a_single_process_creates_the_directory(tmp_path):
    open_as(Group(), ct.CheckpointSpec(directory=tmp_path / "run"), has_validation=True)
    assert (tmp_path / "run" / ".ckpttools").is_dir()


def test_a_process_with_the_leaders_spec_and_directory_is_accepted(tmp_path):
    spec = ct.CheckpointSpec(directory=tmp_path)
    (tmp_path / ".ckpttools").mkdir()
    (tmp_path / ".ckpttools" / "probe-1").touch()
    answer = {"spec": spec.fingerprint(), "directory": str(tmp_path), "probe": "probe-1"}
    open_as(SecondOfTwo(answer), spec)
    with pytest.raises(ct.SpecError, match="process 1 has another spec"):
        open_as(SecondOfTwo({**answer, "spec": "other"}), spec)
    with pytest.raises(ct.StorageError, match="process 1 does not see"):
        open_as(SecondOfTwo({**answer, "probe": "probe-2"}), spec)


@pytest.mark.parametrize("has_validation", [True, False], ids=["validation", "mirror"])
def test_what_several_processes_cannot_do_is_refused(tmp_path, has_validation):
    mirror = None if has_validation else str(tmp_path / "mirror")
    spec = ct.CheckpointSpec(directory=tmp_path / "run", mirror=mirror)
    with pytest.raises(ct.SpecError, match="validation function" if has_validation else "a mirror"):
        open_as(SecondOfTwo({}), spec, has_validation=has_validation)
