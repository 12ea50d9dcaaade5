"""Side by side with every peer: what is timed, how, and what is written down."""

import os

# Read when torch is loaded. On cores that others use too, OpenMP's threads that spin while they
# wait take the core from the one they wait for: times then come in steps of 4 ms.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
