# SPDX-License-Identifier: Apache-2.0
"""One save: from a snapshot in host memory to a committed step on the disk."""
