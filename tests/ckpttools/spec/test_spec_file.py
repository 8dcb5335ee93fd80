# SPDX-License-Identifier: Apache-2.0
"""A spec survives its files, and a mistake in a file is shown with its line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckpttools as ct
from tests.ckpttools.spec.test_retention import RETENTIONS
from tests.ckpttools.spec.test_triggers import TRIGGERS

SPECS = st.builds(
    ct.CheckpointSpec,
    directory=st.text(
        st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=("Cs", "Cc")), min_size=1
    )
    .map(lambda name: f"runs/{name}")
    .filter(lambda name: "://" not in name),
    save=TRIGGERS,
    keep=RETENTIONS,
    storage=st.builds(
        ct.Storage,
        asynchronous=st.booleans(),
        compression=st.booleans(),
        min_free=st.one_of(st.integers(0, 2**40), st.sampled_from(["1x", "2.5x"])),
        when_full=st.sampled_from(["raise", "prune"]),
        timeout_s=st.floats(0.1, 1e6),
    ),
    integrity=st.builds(
        ct.Integrity, digest=st.sampled_from(["xxh3", "sha256"]), verify=st.sampled_from(["digest", "readback"])
    ),
)


@given(SPECS)
def test_a_spec_survives_toml_and_json(spec):
    assert ct.CheckpointSpec.from_toml(spec.to_toml()) == spec
    assert ct.CheckpointSpec.from_json(spec.to_json()) == spec
    assert hash(ct.CheckpointSpec.from_toml(spec.to_toml())) == hash(spec)
    assert ct.CheckpointSpec.from_toml(spec.to_toml()).fingerprint() == spec.fingerprint()


def test_a_run_file_is_read_beside_other_tables(tmp_path):
    path = tmp_path / "train.toml"
    path.write_text(
        """
        [remat.rules]
        "layers.*" = "nothing_saveable"

        [checkpoint]
        directory = "run"
        save = [{ every_steps = 500 }, { on_improvement = "val_loss", mode = "min" }]
        keep = { latest = 3 }

        [checkpoint.storage]
        asynchronous = false
        """
    )
    spec = ct.CheckpointSpec.load(path)
    assert spec.directory == tmp_path / "run"
    assert spec.save == ct.EverySteps(500) | ct.OnImprovement("val_loss", mode="min")
    assert spec.keep == ct.Latest(3)
    assert spec.storage == ct.Storage(asynchronous=False)


@pytest.mark.parametrize(
    ("lines", "line", "message"),
    [
        pytest.param(["save = { every_steps = 0 }"], 3, "EverySteps(n=0)", id="an interval of 0"),
        pytest.param(["save = [{ every_step = 5 }]"], 3, "'every_step' is not known under 'save'", id="a typo"),
        pytest.param(["keep = { latest = 3, nn = 4 }"], 3, "'nn' is not known in latest", id="an unknown field"),
        pytest.param(["", "keeep = { latest = 3 }"], 4, "'keeep' is not known", id="an unknown key"),
        pytest.param(["save = 5"], 3, "save = 5 is not a table", id="no table"),
        pytest.param(["save = {}"], 3, "save = {} is not a table", id="an empty table"),
        pytest.param(["save = { every_steps = 5, every_seconds = 5 }"], 3, "in one table", id="two in one"),
        pytest.param(["save = { on_improvement = 'loss' }"], 3, "on_improvement is incomplete", id="incomplete"),
        pytest.param(["storage = 3"], 3, "storage = 3 is not a table", id="storage is no table"),
        pytest.param(["[checkpoint.storage]", "a = 1", "min_free = '2'"], 4, "'a' is not known", id="below a table"),
        pytest.param(["[checkpoint.storage]", "min_free = '2'"], 4, "Storage(min_free='2')", id="no size"),
        pytest.param(["[checkpoint.storage]", "timeout_s = 0"], 4, "Storage(timeout_s=0)", id="no time"),
        pytest.param(["[checkpoint.storage]", "asynchronous = 1"], 4, "is not a bool", id="no bool"),
        pytest.param(["[checkpoint.integrity]", "digest = 'md5'"], 4, "'md5'", id="an unknown digest"),
        pytest.param(["save = [{ all_of = [] }]"], 3, "does not combine", id="an empty combination"),
    ],
)
def test_a_mistake_is_shown_with_file_and_line(tmp_path, lines, line, message):
    path = tmp_path / "train.toml"
    path.write_text("\n".join(["[checkpoint]", 'directory = "run"', *lines]))
    with pytest.raises(ct.SpecFileError) as caught:
        ct.CheckpointSpec.load(path)
    assert f"{path}, line {line}: " in caught.value.what
    assert message in caught.value.what


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("[checkpoint]\ndirectory = ", "line 2: not TOML", id="not TOML"),
        pytest.param("[chekpoint]\ndirectory = 'x'", "no [checkpoint] table", id="no table"),
        pytest.param("[checkpoint]\n", "no directory", id="no directory"),
    ],
)
def test_a_file_without_a_spec_is_refused(tmp_path, text, message):
    path = tmp_path / "train.toml"
    path.write_text(text)
    with pytest.raises(ct.SpecFileError) as caught:
        ct.CheckpointSpec.load(path)
    assert message in caught.value.what


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ct.SpecFileError, match=r"train\.toml cannot be read"):
        ct.CheckpointSpec.load(tmp_path / "train.toml")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_json_that_is_not_a_spec_is_refused(text):
    with pytest.raises(ct.SpecFileError):
        ct.CheckpointSpec.from_json(text)


def test_a_user_defined_trigger_cannot_be_written_to_a_file():
    class Sometimes(ct.Trigger):
        pass

    spec = ct.CheckpointSpec(directory="run", save=Sometimes())
    with pytest.raises(ct.SpecError, match="cannot be written"):
        spec.to_toml()


def test_a_version_with_migrations_survives_the_spec_file():
    version = ct.StateVersion(
        3, [ct.Migration(1, [ct.Rename("a", "b"), ct.Pad("c", fill=0.5, start=(1, 2))]), ct.Migration(2, ct.Drop("x"))]
    )
    spec = ct.CheckpointSpec(directory="run", state_version=version)
    assert ct.CheckpointSpec.from_toml(spec.to_toml()) == spec
    assert ct.CheckpointSpec.from_json(spec.to_json()) == spec
    plain = ct.CheckpointSpec(directory="run", state_version=7)
    assert "state_version = 7" in plain.to_toml()
    assert ct.CheckpointSpec.from_toml(plain.to_toml()) == plain


@pytest.mark.parametrize(
    ("line", "text"),
    [
        pytest.param('state_version = "a"', "number='a'", id="no number"),
        pytest.param("state_version = { number = 2, migrations = 3 }", "is not a list of tables", id="no list"),
        pytest.param("state_version = { number = 2, migrations = [{ from = 1 }] }", "a migration", id="field"),
        pytest.param("state_version = { number = 2, migration = [] }", "state_version", id="field of the version"),
        pytest.param(
            'state_version = { number = 2, migrations = [{ from_version = 1, surgery = "x" }] }',
            "is not a surgery operation",
            id="surgery",
        ),
    ],
)
def test_a_wrong_version_in_a_spec_file_names_its_line(line, text):
    with pytest.raises(ct.SpecFileError, match="line 3") as caught:
        ct.CheckpointSpec.from_toml(f'[checkpoint]\ndirectory = "run"\n{line}\n')
    assert text in str(caught.value)
