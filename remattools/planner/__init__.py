# SPDX-License-Identifier: Apache-2.0
"""From a memory budget to rules: `plan` searches, `model` predicts, the compiler decides."""
