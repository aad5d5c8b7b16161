"""dspark-server: lossless speculative decoding, scheduled by confidence and load (DSpark, 2026)."""

import os

__version__ = "0.1.0"

# torch's threads wait like ours (kernels/cpu/parallel.c): they spin for about 50 microseconds, then sleep. By default
# they spin for milliseconds, which on a busy machine takes the time of the threads they wait for. libgomp reads this
# when torch is imported, which is after this package.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
