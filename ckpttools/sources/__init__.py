# SPDX-License-Identifier: Apache-2.0
"""What a person points at, a run, a step, a mirror or another writer's checkpoint, read as steps."""
