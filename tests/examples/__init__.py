# SPDX-License-Identifier: Apache-2.0
"""The examples, run as a reader would."""
