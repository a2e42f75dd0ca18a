"""``python -m glcan_fx``: the same as the command ``glcan-fx``."""

import sys

from glcan_fx.cli.main import main

sys.exit(main())
