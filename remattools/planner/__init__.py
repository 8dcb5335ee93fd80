# SPDX-License-Identifier: Apache-2.0
"""A memory budget in, rules out."""
