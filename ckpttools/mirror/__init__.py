# SPDX-License-Identifier: Apache-2.0
"""A second copy of each committed step at an fsspec address: upload, fetch, compare."""
