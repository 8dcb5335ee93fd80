# SPDX-License-Identifier: Apache-2.0
"""Jaxprs as data: walk, rename, split and evaluate. Knows no model and no rules."""
