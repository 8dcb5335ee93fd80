# SPDX-License-Identifier: Apache-2.0
"""The operations by the names that they have in spec files."""

from .join_operations import Merge, Split, Stack, Unstack
from .leaf_operations import Cast, Copy, Drop, Pad, Reinit, Rename, Slice, Transpose
from .operation import Operation

OPERATIONS: dict[str, type[Operation]] = {
    "rename": Rename,
    "copy": Copy,
    "drop": Drop,
    "reinit": Reinit,
    "cast": Cast,
    "pad": Pad,
    "slice": Slice,
    "transpose": Transpose,
    "stack": Stack,
    "unstack": Unstack,
    "merge": Merge,
    "split": Split,
}
"""Operations by their names in files."""
