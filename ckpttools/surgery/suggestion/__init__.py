# SPDX-License-Identifier: Apache-2.0
"""Which stored leaf becomes which leaf of the state, and what is done to it on the way."""
