# SPDX-License-Identifier: Apache-2.0
"""A session, or a spec, in the form that other libraries' training loops expect."""
