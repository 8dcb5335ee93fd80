# SPDX-License-Identifier: Apache-2.0
"""What the compiler is asked for and what it answers: targets, placement, measurements and their cache."""
