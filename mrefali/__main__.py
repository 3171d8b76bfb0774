"""``python -m mrefali``: the same as the command ``mrefali``. Imports the command line and nothing else."""
import sys

from mrefali.cli import main

sys.exit(main())
