# SPDX-License-Identifier: Apache-2.0
"""A spec checks its fields when it is built, compares by value, and knows its metrics."""

import pathlib

import pytest

import ckpttools as ct


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"directory": ""}, "does not name a directory", id="no directory"),
        pytest.param({"directory": "gs://bucket/run"}, "is an address", id="an object store"),
        pytest.param({"save": ct.Latest(3)}, "save must be a Trigger", id="the wrong kind"),
        pytest.param({"keep": 3}, "keep must be a Retention", id="a number"),
    ],
)
def test_a_spec_checks_its_fields(changes, message):
    with pytest.raises(ct.SpecError, match=message):
        ct.CheckpointSpec(**{"directory": "run", **changes})


def test_specs_are_hashable_and_compare_by_value():
    make = lambda: ct.CheckpointSpec(directory="run", save=ct.EverySteps(5) | ct.AtSteps([7]))  # noqa: E731
    assert make() == make()
    assert hash(make()) == hash(make())
    assert make().directory == pathlib.Path("run")


def test_an_address_is_a_mirror_and_a_number_a_version():
    spec = ct.CheckpointSpec(directory="run", mirror="s3://bucket/run", state_version=3)
    assert spec.mirror == ct.Mirror("s3://bucket/run")
    assert spec.state_version == ct.StateVersion(3)
    assert ct.CheckpointSpec(directory="run").mirror is None, "control"


def test_metrics_of_keep_come_before_those_of_save():
    save = ct.EverySteps(5) | ct.OnImprovement("loss", mode="max") | ct.OnImprovement("reward", mode="max")
    spec = ct.CheckpointSpec(directory="run", save=save, keep=ct.Latest(3) | ct.Best("loss", mode="min"))
    assert list(spec.get_metric_modes().items()) == [("loss", "min"), ("reward", "max")]
    assert ct.CheckpointSpec(directory="run").get_metric_modes() == {}


def test_the_fingerprint_ignores_the_directory_only():
    spec = ct.CheckpointSpec(directory="run", keep=ct.Latest(3))
    assert ct.CheckpointSpec(directory="other", keep=ct.Latest(3)).fingerprint() == spec.fingerprint()
    assert ct.CheckpointSpec(directory="run", keep=ct.Latest(4)).fingerprint() != spec.fingerprint()


def test_a_user_defined_trigger_has_a_fingerprint():
    class Sometimes(ct.Trigger):
        def __repr__(self):
            return "Sometimes()"

    first, second = (ct.CheckpointSpec(directory=name, save=Sometimes()).fingerprint() for name in ("a", "b"))
    assert first == second
    assert first != ct.CheckpointSpec(directory="a").fingerprint()


def test_a_spec_survives_its_own_toml_and_json(tmp_path):
    spec = ct.CheckpointSpec(directory="run", save=ct.EverySteps(5), keep=ct.Best("loss", mode="min"))
    assert ct.CheckpointSpec.from_toml(spec.to_toml()) == spec
    assert ct.CheckpointSpec.from_json(spec.to_json()) == spec
    (tmp_path / "train.toml").write_text(spec.to_toml())
    assert ct.CheckpointSpec.load(tmp_path / "train.toml").directory == tmp_path / "run", "relative to the file"
