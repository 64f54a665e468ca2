"""`python -m timo.cli`, where the `timo` script is not on the path."""

import sys

from timo.cli.main import main

sys.exit(main())
