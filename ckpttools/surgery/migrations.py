# SPDX-License-Identifier: Apache-2.0
"""Choose what to change in a step of the run: migrations from its version, and surgery not applied before."""

from ..errors import VersionError
from ..spec.operations import as_code
from ..spec.spec import CheckpointSpec
from ..spec.state import StateVersion, as_rules, as_state_version
from ..spec.surgery import Surgery
from ..store.catalogue import Entry
from .plan import Changes


def get_changes(spec: CheckpointSpec, entry: Entry, surgery: Surgery) -> Changes:
    """Return the changes for a step of the run itself.

    Args:
        spec: The run's spec, with the version of the state.
        entry: The step.
        surgery: What the caller requested; operations that the step already records are skipped.

    Raises:
        VersionError: If the state of the step is newer than the spec's version, or too old for its migrations.
    """
    applied = entry.manifest.contents.surgery if entry.manifest else ()
    remaining = Surgery(operation for operation in surgery if as_code(operation) not in applied)
    migrations = get_migrations(as_state_version(spec.state_version), entry)
    return Changes(migrations=migrations, surgery=remaining, exclude=as_rules(spec.exclude))


def get_migrations(target: StateVersion, entry: Entry) -> tuple[Surgery, ...]:
    """Return the surgery that brings the state of a step up to a version, oldest first.

    Raises:
        VersionError: If the step is newer than the version, or too old for its migrations.
    """
    version = entry.manifest.contents.state_version if entry.manifest else target.number
    if version > target.number:
        raise VersionError(
            what=f"the state of step {entry.step} has version {version}; this program supports versions up to "
            f"{target.number}.",
            why="a newer program saved it, and this one cannot know what its leaves mean. Nothing was changed.",
            fix="run the newer program, or restore(step=...) an older step by its number.",
        )
    if version < target.oldest:
        raise VersionError(
            what=f"the state of step {entry.step} has version {version}; the migrations begin at {target.oldest}.",
            why="without the migrations in between, its leaves could be misread. Nothing was changed.",
            fix=f"StateVersion({target.number}, migrations=[ct.Migration({version}, surgery=[...]), ...])",
        )
    return target.get_surgery_since(version)
