# SPDX-License-Identifier: Apache-2.0
"""Everything that a region's call can reach, as arrays and a hashable spec, and what the call changes in it."""
