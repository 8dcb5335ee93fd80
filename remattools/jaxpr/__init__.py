# SPDX-License-Identifier: Apache-2.0
"""Jaxprs as data: walk, rename, split and evaluate. Independent of models and rules."""
