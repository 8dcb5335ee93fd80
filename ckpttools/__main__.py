# SPDX-License-Identifier: Apache-2.0
"""`python -m ckpttools` is the command `ckpttools`."""

import sys

from .cli.commands import main

sys.exit(main())
