# SPDX-License-Identifier: Apache-2.0
"""Names and paths inside a run's directory."""

import pytest

from ckpttools.store import layout


@pytest.mark.parametrize("name", ["07", "1.5", "-1", "x", "1e3", "", "1" * 19])
def test_only_plain_numbers_are_names_of_steps(name):
    assert layout.parse_step_number(name) is None


@pytest.mark.parametrize("step", [0, 7, 1000, layout.MAX_STEP])
def test_a_step_is_found_by_the_name_of_its_directory(tmp_path, step):
    assert layout.parse_step_number(layout.get_step_directory(tmp_path, step).name) == step


def test_control_files_are_below_one_directory(tmp_path):
    control = layout.get_control_path(tmp_path)
    assert control == tmp_path / ".ckpttools"
    assert layout.get_control_path(tmp_path, "staging/9").is_relative_to(control)
    assert layout.get_spare_directory(tmp_path, 3) == control / "spare" / "3"
    assert layout.parse_step_number(control.name) is None, "plain Orbax does not take it for a step"


def test_a_free_path_is_numbered_from_2(tmp_path):
    assert layout.find_free_path(tmp_path, "30") == tmp_path / "30"
    (tmp_path / "30").mkdir()
    (tmp_path / "30-2").touch()
    assert layout.find_free_path(tmp_path, "30") == tmp_path / "30-3"
