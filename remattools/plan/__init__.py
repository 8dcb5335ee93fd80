# SPDX-License-Identifier: Apache-2.0
"""A budget in, rules out."""
