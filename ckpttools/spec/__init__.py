# SPDX-License-Identifier: Apache-2.0
"""Values that say when to save and what to keep, and their files. Pure: no disk, no clock."""
