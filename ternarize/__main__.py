"""``python -m ternarize`` is the command ``ternarize``."""

import sys

from ternarize.cli import main

sys.exit(main())
