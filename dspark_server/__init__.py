"""dspark-server: lossless speculative decoding, scheduled by confidence and load (DSpark, 2026)."""

import os

__version__ = "0.1.0"

# torch's own threads wait as ours do (kernels/cpu/parallel.c): they spin some 50 microseconds, then sleep. By default
# they spin for milliseconds, and take the time of those they wait for where the machine has other work. libgomp reads
# this when torch is imported, which this package is before.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
