# SPDX-License-Identifier: Apache-2.0
"""The modules that are imported on their first use."""

from . import flax_msgpack as flax_msgpack
