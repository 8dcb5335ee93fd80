# SPDX-License-Identifier: Apache-2.0
"""Eight host devices for the sharded tests, and quick machine code; must stand before JAX starts.

Half of the suite's time went into optimizing machine code that runs once. The level changes no program of XLA's:
fusions, schedules and buffers are the same. Where optimized code matters (`make test-remat3`, `test-long`), the flag is
set.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
for flag, value in (("xla_force_host_platform_device_count", 8), ("xla_backend_optimization_level", 0)):
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{flag}={value}".strip()
