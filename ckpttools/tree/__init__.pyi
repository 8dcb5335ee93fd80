# SPDX-License-Identifier: Apache-2.0
"""The module that is imported on its first use."""

from . import key_data as key_data
