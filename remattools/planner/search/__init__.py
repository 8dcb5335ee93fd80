# SPDX-License-Identifier: Apache-2.0
"""Which combination of saved values is compiled next, and the rules it is written as."""
