# SPDX-License-Identifier: Apache-2.0
"""Another writer's checkpoint becomes a step with digests; what cannot be read is passed over by name."""

import numpy as np
import pytest

import ckpttools as ct
from ckpttools.sources import foreign_snapshot
from ckpttools.store import catalogue, manifest
from tests.ckpttools.store.writers import RUNS, SINGLES, write
from tests.ckpttools.tools.runs import snapshot_of


@pytest.fixture(params=["standard", "flax"])
def run(request, tmp_path):
    """A run of the steps 10 and 20 in directories of Orbax, or in files of flax."""
    return write(RUNS[request.param], tmp_path / "run")


def list_entries(run):
    return catalogue.scan(run).entries


def test_all_leaves_get_records_with_digests(run):
    taken = foreign_snapshot.read_snapshot(list_entries(run)[0])
    records = {".".join(map(str, record.path)): record for record in taken.records["default"]}
    assert sorted(records) == ["nested.b", "w"]
    assert (records["w"].shape, records["w"].dtype) == ((2, 3), "float32")
    assert all(record.digest.startswith("xxh3:") for record in records.values())
    assert records["w"].digest != records["nested.b"].digest


def test_a_manifest_describes_the_files_of_a_checkpoint(run):
    entry = list_entries(run)[0]
    taken = foreign_snapshot.read_snapshot(entry)
    directory = entry.path if entry.path.is_dir() else entry.path.parent
    data = foreign_snapshot.make_manifest(entry, taken, directory, sequence=4, lineage=(("branch", 0),))
    made = manifest.parse_manifest(data).summary
    assert (made.step, made.sequence, made.lineage) == (10, 4, (("branch", 0),))
    assert set(made.files) == {str(path) for path in snapshot_of(directory)}
    assert made.total_bytes == sum(map(len, snapshot_of(directory).values()))
    assert ("msgpack" in made.reason) == entry.path.is_file()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"loss": 0.25, "name": "best", "list": [1]}', {"loss": 0.25}),
        ("[0.25]", {}),
        ('{"loss":', {}),
        (None, {}),
    ],
    ids=["numbers only", "not a dict", "cut", "none"],
)
def test_metrics_of_orbax_are_read_where_they_can_be(tmp_path, text, expected):
    write(SINGLES["standard"], tmp_path / "3")
    (entry,) = list_entries(tmp_path)
    taken = foreign_snapshot.read_snapshot(entry)
    if text is not None:
        (entry.path / "metrics").mkdir()
        (entry.path / "metrics" / "metrics").write_text(text)
    made = manifest.parse_manifest(foreign_snapshot.make_manifest(entry, taken, entry.path))
    assert made.summary.metrics == expected


def test_foreign_steps_are_read_as_committed_and_stay_unchanged(run):
    before = snapshot_of(run)
    entries = list_entries(run)
    assert {entry.state for entry in entries} == {"unverified"}, "control"
    with foreign_snapshot.read_as_steps(entries) as steps:
        found = list(steps)
        assert [(entry.step, entry.state, entry.error) for entry in found] == [
            (10, "committed", None),
            (20, "committed", None),
        ]
        places = [entry.path for entry in found]
        assert all(place.is_dir() for place in places)
    # A file of flax's was converted to a directory beside the run, which is removed in the end.
    assert [place.exists() for place in places] == [entry.path.is_dir() for entry in entries]
    assert snapshot_of(run) == before


def test_each_step_is_read_only_when_it_is_asked_for(run, monkeypatch):
    asked = []
    real = foreign_snapshot.read_snapshot
    monkeypatch.setattr(foreign_snapshot, "read_snapshot", lambda entry: asked.append(entry.step) or real(entry))
    with foreign_snapshot.read_as_steps(list_entries(run)) as steps:
        assert asked == []
        next(steps)
        assert asked == [10]


def test_a_step_that_cannot_be_read_is_incomplete(run):
    entries = list_entries(run)
    broken = entries[1].path
    for path in [broken] if broken.is_file() else broken.rglob("manifest.ocdbt"):
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ct.IncompleteStepError, match=f"{broken.name} cannot be read") as caught:
        foreign_snapshot.read_snapshot(entries[1])
    assert str(broken) in caught.value.fix
    with foreign_snapshot.read_as_steps(entries) as steps:
        good, bad = steps
    assert good.state == "committed", "control"
    assert (bad.state, bad.manifest, bad.path) == ("incomplete", None, broken)
    assert isinstance(bad.error, ct.IncompleteStepError)


def test_our_own_steps_pass_unchanged(tmp_path):
    with ct.open(ct.CheckpointSpec(directory=tmp_path, storage=ct.Storage(asynchronous=False))) as ckpt:
        ckpt.save(1, {"item": {"w": np.ones(2)}})
    entries = list_entries(tmp_path)
    with foreign_snapshot.read_as_steps(entries) as steps:
        assert [step is entry for step, entry in zip(steps, entries, strict=True)] == [True]
