"""``python -m ternarize.train`` is ``ternarize train``."""

import sys

from ternarize.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
