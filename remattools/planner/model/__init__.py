# SPDX-License-Identifier: Apache-2.0
"""What the planner predicts of a program without compiling it: its memory in `memory`, its time in `time`."""
