"""``python -m ternarize.smoke`` is ``ternarize smoke``."""

import sys

from ternarize.cli import main

sys.exit(main(["smoke", *sys.argv[1:]]))
