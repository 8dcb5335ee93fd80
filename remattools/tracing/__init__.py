# SPDX-License-Identifier: Apache-2.0
"""A user's function as a pure function of arrays, and where each operation of its jaxpr comes from."""
