# SPDX-License-Identifier: Apache-2.0
"""Operations of surgery: what must happen to stored leaves so that they fit another model, as frozen values.

Pure: values and strings. Names begin with the item, as errors and reports show them: `model.layers.0.kernel`. A pattern
(the language of remattools' rules) matches a leaf, or a part of the state with everything below it. The operations are
applied in order, each to the names that the previous one produced. The room `surgery` applies them.
"""

from .by_name import OPERATIONS as OPERATIONS
from .join_operations import Join as Join
from .join_operations import Merge as Merge
from .join_operations import Split as Split
from .join_operations import Stack as Stack
from .join_operations import Unstack as Unstack
from .leaf_operations import DTYPES as DTYPES
from .leaf_operations import Cast as Cast
from .leaf_operations import Copy as Copy
from .leaf_operations import Drop as Drop
from .leaf_operations import Pad as Pad
from .leaf_operations import Reinit as Reinit
from .leaf_operations import Rename as Rename
from .leaf_operations import Slice as Slice
from .leaf_operations import Transpose as Transpose
from .operation import WILDCARD as WILDCARD
from .operation import Operation as Operation
from .operation import as_code as as_code
from .operation import find_wildcards as find_wildcards
from .operation import split_segments as split_segments
