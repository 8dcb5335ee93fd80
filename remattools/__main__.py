# SPDX-License-Identifier: Apache-2.0
"""`python -m remattools`."""

import sys

from .cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
