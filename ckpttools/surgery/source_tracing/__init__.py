# SPDX-License-Identifier: Apache-2.0
"""Find the likely source on disk of each leaf of a state, and write the operations that move it there."""
