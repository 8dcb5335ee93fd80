# SPDX-License-Identifier: Apache-2.0
"""Along which axes an equation can be computed in pieces, and how one piece of it is computed."""
