# SPDX-License-Identifier: Apache-2.0
"""A user's call as a pure function of arrays, and the module that each operation of its jaxpr comes from."""
