# SPDX-License-Identifier: Apache-2.0
"""What a person does with a run outside training, one function per file."""
