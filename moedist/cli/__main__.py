"""``python -m moedist.cli``: the command line without the installed script."""

import sys

from moedist.cli.main import main

sys.exit(main())
