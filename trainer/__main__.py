"""One rank of a run: what `deepspeed --module zeropipe.trainer` starts on every device."""

import sys

from .commands.train import main

if __name__ == "__main__":
    sys.exit(main())
