# SPDX-License-Identifier: Apache-2.0
"""What compilers are asked and what they report: targets, lowering, memory and cycles, and a cache of both."""
