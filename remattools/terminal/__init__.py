# SPDX-License-Identifier: Apache-2.0
"""What people see while a command or a plan runs: progress, and the output of C libraries."""
