# SPDX-License-Identifier: Apache-2.0
"""Opening a run: what is refused before anything is trained."""

import pytest

import ckpttools as ct

from .runs import spec_for


def test_a_path_instead_of_a_spec_is_refused(tmp_path):
    with pytest.raises(ct.SpecError, match="by a CheckpointSpec") as caught:
        ct.open(str(tmp_path))
    assert "CheckpointSpec(directory=" in caught.value.fix


def test_a_directory_that_cannot_be_written_fails_at_open(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ct.StorageError, match="cannot be written"):
        ct.open(spec_for(tmp_path / "file" / "run"))
