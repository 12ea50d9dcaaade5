"""Side by side with every peer: what is timed, how, and what is written down."""

import os
import sys
from pathlib import Path

# Read when torch is loaded. On cores that others use too, OpenMP's threads that spin while they
# wait take the core from the one they wait for: times then come in steps of 4 ms.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# `python -m benchmarks.x` puts the checkout first, where its folder `kernels` hides the package of
# that name, which bitsandbytes looks for.
_ROOT = str(Path(__file__).resolve().parents[1])
if sys.path and sys.path[0] in ("", _ROOT):
    sys.path.append(sys.path.pop(0))
