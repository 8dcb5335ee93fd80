# SPDX-License-Identifier: Apache-2.0
"""The planner's prediction of a program: its blocks, their memory and their time."""
