"""``python -m glcan_fx``: the same as the command ``glcan-fx``."""

import sys

from .cli import main

sys.exit(main())
