"""``python -m nemo_bard.cli``."""

import sys

from nemo_bard.cli.app import main

sys.exit(main())
