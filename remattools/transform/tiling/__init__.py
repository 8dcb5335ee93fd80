# SPDX-License-Identifier: Apache-2.0
"""Large values of a traced program in pieces: which equations form a stretch, and the scan that computes it."""
