# SPDX-License-Identifier: Apache-2.0
"""What the scheduled text of a compiled program says: instructions, live buffers at the peak, and who made them."""
