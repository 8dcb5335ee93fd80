# SPDX-License-Identifier: Apache-2.0
"""Read the steps of a location: a run, one step, a mirror, or another program's checkpoints."""
