"""The benchmarks are not installed: they are imported from the checkout."""

import sys
from pathlib import Path

# Last, so that an installed ucan_fast is not shadowed by the checkout's.
sys.path.append(str(Path(__file__).resolve().parents[2]))
