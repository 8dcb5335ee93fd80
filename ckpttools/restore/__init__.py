# SPDX-License-Identifier: Apache-2.0
"""Which step is restored, how its bytes are verified, and how they get into the state."""
