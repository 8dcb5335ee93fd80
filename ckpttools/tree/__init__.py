# SPDX-License-Identifier: Apache-2.0
"""nnx objects and pytrees to named leaves and back. No disk."""
