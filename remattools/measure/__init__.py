# SPDX-License-Identifier: Apache-2.0
"""A function in, the compiler's figures out."""
