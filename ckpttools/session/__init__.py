# SPDX-License-Identifier: Apache-2.0
"""A run that is open: what a training loop calls."""
