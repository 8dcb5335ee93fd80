# SPDX-License-Identifier: Apache-2.0
"""The modules that are imported on their first use."""

from . import leaf_integrity as leaf_integrity
from . import orbax as orbax
