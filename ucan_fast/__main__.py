"""``python -m ucan_fast`` is ``ucan-fast``."""

import sys

from .cli import main

sys.exit(main())
