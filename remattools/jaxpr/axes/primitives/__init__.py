# SPDX-License-Identifier: Apache-2.0
"""Rules of JAX's primitives, a file for each kind, each with a table by the primitive's name."""
