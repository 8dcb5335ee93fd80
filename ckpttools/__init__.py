# SPDX-License-Identifier: Apache-2.0
"""Model checkpoints that cannot be lost and cannot lie.

import ckpttools as ct

spec = ct.CheckpointSpec(directory="runs/exp1", save=ct.EverySteps(500), keep=ct.Latest(3))
with ct.open(spec) as ckpt:
    report = ckpt.restore(state)
    for step in ckpt.steps(total):
        ...
        ckpt.step(step, state, metrics={"val_loss": loss})
"""

from . import functional as functional
from .errors import CheckpointError as CheckpointError
from .errors import CheckpointWarning as CheckpointWarning
from .errors import CorruptStepError as CorruptStepError
from .errors import DiskSpaceError as DiskSpaceError
from .errors import IncompleteStepError as IncompleteStepError
from .errors import LeafError as LeafError
from .errors import MirrorError as MirrorError
from .errors import NoIntactStepError as NoIntactStepError
from .errors import NotRestoredError as NotRestoredError
from .errors import ProcessError as ProcessError
from .errors import RunInUseError as RunInUseError
from .errors import SaveTimeoutError as SaveTimeoutError
from .errors import SpecError as SpecError
from .errors import SpecFileError as SpecFileError
from .errors import StepDamagedError as StepDamagedError
from .errors import StepNotFoundError as StepNotFoundError
from .errors import StepOrderError as StepOrderError
from .errors import StepRejectedError as StepRejectedError
from .errors import StorageError as StorageError
from .errors import StructureError as StructureError
from .errors import TensorFileError as TensorFileError
from .errors import UntrustedStepError as UntrustedStepError
from .errors import ValidationError as ValidationError
from .errors import VersionError as VersionError
from .integrations.orbax_manager import CheckpointManager as CheckpointManager
from .integrations.orbax_options import orbax_options as orbax_options
from .integrations.trainers import FlaxLoop as FlaxLoop
from .integrations.trainers import Trainer as Trainer
from .integrations.trainers import TrainReport as TrainReport
from .integrations.trainers import train as train
from .integrations.tunix import PeftCheckpoints as PeftCheckpoints
from .integrations.tunix import peft_trainer as peft_trainer
from .mirror.sync import MirroredStep as MirroredStep
from .mirror.sync import MirrorReport as MirrorReport
from .mirror.sync import fetch_step as fetch_step
from .mirror.sync import sync_mirror as sync_mirror
from .mirror.upload import MirrorStatus as MirrorStatus
from .restore.load import Preview as Preview
from .restore.load import load as load
from .restore.load import preview as preview
from .restore.report import Candidate as Candidate
from .restore.report import RestoreReport as RestoreReport
from .restore.select import best as best
from .save.outcomes import Failed as Failed
from .save.outcomes import Outcome as Outcome
from .save.outcomes import Saved as Saved
from .save.outcomes import Skipped as Skipped
from .save.outcomes import Started as Started
from .session.open import open as open
from .session.session import Session as Session
from .spec.mirror import Mirror as Mirror
from .spec.operations import Cast as Cast
from .spec.operations import Drop as Drop
from .spec.operations import Pad as Pad
from .spec.operations import Reinit as Reinit
from .spec.operations import Rename as Rename
from .spec.operations import Slice as Slice
from .spec.retention import All as All
from .spec.retention import Best as Best
from .spec.retention import EveryNSeconds as EveryNSeconds
from .spec.retention import EveryNSteps as EveryNSteps
from .spec.retention import Latest as Latest
from .spec.retention import Pinned as Pinned
from .spec.retention import Retention as Retention
from .spec.schema import json_schema as json_schema
from .spec.spec import CheckpointSpec as CheckpointSpec
from .spec.state_version import Migration as Migration
from .spec.state_version import StateVersion as StateVersion
from .spec.storage import Integrity as Integrity
from .spec.storage import Storage as Storage
from .spec.surgery import Surgery as Surgery
from .spec.triggers import Adaptive as Adaptive
from .spec.triggers import AtSteps as AtSteps
from .spec.triggers import EverySeconds as EverySeconds
from .spec.triggers import EverySteps as EverySteps
from .spec.triggers import OnImprovement as OnImprovement
from .spec.triggers import Trigger as Trigger
from .surgery.altered_leaves import AlteredLeaf as AlteredLeaf
from .tools.adopt import adopt as adopt
from .tools.diff import ChangedLeaf as ChangedLeaf
from .tools.diff import DiffReport as DiffReport
from .tools.diff import diff as diff
from .tools.import_run import import_run as import_run
from .tools.ls import ListedStep as ListedStep
from .tools.ls import Listing as Listing
from .tools.ls import empty_quarantine as empty_quarantine
from .tools.ls import ls as ls
from .tools.ls import prune as prune
from .tools.repair import Repair as Repair
from .tools.repair import RepairReport as RepairReport
from .tools.repair import repair as repair
from .tools.safetensors_exchange import export_safetensors as export_safetensors
from .tools.safetensors_exchange import import_safetensors as import_safetensors
from .tools.show import ShownLeaf as ShownLeaf
from .tools.show import ShownStep as ShownStep
from .tools.show import show as show
from .tools.verify import StepHealth as StepHealth
from .tools.verify import VerifyReport as VerifyReport
from .tools.verify import verify as verify
