"""`python -m peftplan`: the command line where its script is not on the path."""

import sys

from peftplan.cli import main

sys.exit(main())
