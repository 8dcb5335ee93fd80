# SPDX-License-Identifier: Apache-2.0
"""Values and text: patterns, policies, actions, rules. No tracing here."""
