# SPDX-License-Identifier: Apache-2.0
"""The public functions that look at a call: `measure`, `compare`, `check`, `residuals`, `timeline`; one file each."""
