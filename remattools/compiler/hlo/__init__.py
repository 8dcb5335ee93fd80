# SPDX-License-Identifier: Apache-2.0
"""What the scheduled text of a compiled program says: its instructions, the live buffers at its peak, and who made them."""
