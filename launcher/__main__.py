"""`python -m zeropipe.launcher VERB` is `zeropipe VERB`."""

import sys

from .cli import main

sys.exit(main())
