# SPDX-License-Identifier: Apache-2.0
"""A function in; its memory, residuals and cycles out, by module path."""
