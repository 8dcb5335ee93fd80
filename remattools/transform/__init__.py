# SPDX-License-Identifier: Apache-2.0
"""A model in, the same model with regions out."""
