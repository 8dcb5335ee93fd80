# SPDX-License-Identifier: Apache-2.0
"""One save: from a snapshot on the host to a committed step on the disk."""
