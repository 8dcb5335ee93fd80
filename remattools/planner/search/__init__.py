# SPDX-License-Identifier: Apache-2.0
"""Which assignment of choices to blocks is compiled next, and the rules that it is written as."""
