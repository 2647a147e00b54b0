"""``python -m moedist``: the command line without the installed script."""

import sys

from moedist.cli.main import main

sys.exit(main())
