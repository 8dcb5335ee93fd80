# SPDX-License-Identifier: Apache-2.0
"""The command `remattools`: what it accepts, what each command does, and what it prints."""
