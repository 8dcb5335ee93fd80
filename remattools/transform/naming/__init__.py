# SPDX-License-Identifier: Apache-2.0
"""Module paths on the operations of a region, and the names that policies save by."""
