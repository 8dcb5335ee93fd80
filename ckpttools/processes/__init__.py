# SPDX-License-Identifier: Apache-2.0
"""The processes of one distributed run: who leads, what is broadcast, where all wait for each other."""
