"""The command line: ``python -m jaxpeft``; see `jaxpeft.cli`."""

import sys

from jaxpeft.cli import main

sys.exit(main())
