"""`python -m peftplan.cli` is `peftplan`."""

import sys

from peftplan.cli.shell import main

sys.exit(main())
