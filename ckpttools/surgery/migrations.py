# SPDX-License-Identifier: Apache-2.0
"""What a step of a run may need to fit: migrations from its version, and surgery that was not done before."""

from ..errors import VersionError
from ..spec.operations import as_code
from ..spec.spec import CheckpointSpec
from ..spec.state_version import StateVersion, as_state_version
from ..spec.surgery import Surgery
from ..store.catalogue import Entry
from .plan import Changes


def get_changes(spec: CheckpointSpec, entry: Entry, surgery: Surgery) -> Changes:
    """What is done to a step of the run itself.

    Raises:
        VersionError: If the state of the step is newer than the spec's version, or too old for its migrations.
    """
    done = entry.manifest.contents.surgery if entry.manifest else ()
    left = Surgery(operation for operation in surgery if as_code(operation) not in done)
    return Changes(migrations=get_migrations(as_state_version(spec.state_version), entry), surgery=left)


def get_migrations(target: StateVersion, entry: Entry) -> tuple[Surgery, ...]:
    """The surgery that brings the state of a step up to a version.

    Raises:
        VersionError: If there is no way to it.
    """
    version = entry.manifest.contents.state_version if entry.manifest else target.number
    if version > target.number:
        raise VersionError(
            what=f"the state of step {entry.step} has version {version}; this program knows versions up to "
            f"{target.number}.",
            why="a newer program saved it, and what has changed since is not known here. Nothing was changed.",
            fix="run the newer program, or restore(step=...) an older step by its number.",
        )
    if version < target.oldest:
        raise VersionError(
            what=f"the state of step {entry.step} has version {version}; the migrations begin at {target.oldest}.",
            why="without the steps in between it is not known what its leaves mean now. Nothing was changed.",
            fix=f"StateVersion({target.number}, migrations=[ct.Migration({version}, surgery=[...]), ...])",
        )
    return target.get_surgery_since(version)
