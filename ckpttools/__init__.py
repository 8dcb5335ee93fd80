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
from .adopting import adopt as adopt
from .altering import AlteredLeaf as AlteredLeaf
from .api import best as best
from .api import open as open
from .diffing import ChangedLeaf as ChangedLeaf
from .diffing import DiffReport as DiffReport
from .diffing import diff as diff
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
from .exchange import export_safetensors as export_safetensors
from .exchange import import_safetensors as import_safetensors
from .importing import import_run as import_run
from .listing import ListedStep as ListedStep
from .listing import Listing as Listing
from .listing import empty_quarantine as empty_quarantine
from .listing import ls as ls
from .listing import prune as prune
from .loading import Preview as Preview
from .loading import load as load
from .loading import preview as preview
from .managing import CheckpointManager as CheckpointManager
from .mirroring import MirrorStatus as MirrorStatus
from .options import orbax_options as orbax_options
from .outcomes import Failed as Failed
from .outcomes import Outcome as Outcome
from .outcomes import Saved as Saved
from .outcomes import Skipped as Skipped
from .outcomes import Started as Started
from .peft import PeftCheckpoints as PeftCheckpoints
from .peft import peft_trainer as peft_trainer
from .repairing import Repair as Repair
from .repairing import RepairReport as RepairReport
from .repairing import repair as repair
from .report import Candidate as Candidate
from .report import RestoreReport as RestoreReport
from .session import Session as Session
from .showing import ShownLeaf as ShownLeaf
from .showing import ShownStep as ShownStep
from .showing import show as show
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
from .spec.storage import Integrity as Integrity
from .spec.storage import Storage as Storage
from .spec.surgery import Surgery as Surgery
from .spec.triggers import Adaptive as Adaptive
from .spec.triggers import AtSteps as AtSteps
from .spec.triggers import EverySeconds as EverySeconds
from .spec.triggers import EverySteps as EverySteps
from .spec.triggers import OnImprovement as OnImprovement
from .spec.triggers import Trigger as Trigger
from .spec.versions import Migration as Migration
from .spec.versions import StateVersion as StateVersion
from .syncing import MirroredStep as MirroredStep
from .syncing import MirrorReport as MirrorReport
from .syncing import fetch_step as fetch_step
from .syncing import sync_mirror as sync_mirror
from .trainers import FlaxLoop as FlaxLoop
from .trainers import Trainer as Trainer
from .trainers import TrainReport as TrainReport
from .trainers import train as train
from .verifying import StepHealth as StepHealth
from .verifying import VerifyReport as VerifyReport
from .verifying import verify as verify
