# SPDX-License-Identifier: Apache-2.0
"""`ct.sync_mirror`: a mirror brought up to date and repaired by hand."""

import dataclasses

import ckpttools as ct
from tests.ckpttools.mirror.mirrors import nas, save
from tests.ckpttools.restore.test_first_intact import flip_bit, largest_file


def done(spec, **options):
    report = ct.sync_mirror(spec.directory, spec.mirror, **options)
    return [each.done for each in report.steps], report.ok


def test_missing_steps_are_copied_and_a_dry_run_copies_none(on_disk):
    save(dataclasses.replace(on_disk, mirror=None), 1, 2)
    assert done(on_disk, dry_run=True) == (["would be copied"] * 2, True)
    assert done(on_disk) == (["copied"] * 2, True), "the dry run has copied nothing"
    assert done(on_disk) == (["", ""], True)


def test_damage_at_the_mirror_is_repaired_from_the_local_step(on_disk):
    save(on_disk, 1)
    flip_bit(largest_file(nas(on_disk, 1)))
    assert done(on_disk) == ([""], True), "control: without check nothing is read"
    assert done(on_disk, check=True, dry_run=True) == (["would be repaired"], False)
    assert done(on_disk, check=True) == (["repaired"], True)
    assert done(on_disk, check=True) == ([""], True)
