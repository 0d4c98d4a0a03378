"""One rank of a run: what `deepspeed --module zeropipe.trainer` starts on every device."""

import faulthandler
import os
import sys

from .commands.train import main
from .keeper.keeper import under_keeper
from .ranks.variables import rank_number

if __name__ == "__main__":
    faulthandler.enable()  # a block that a memory-mapped store cannot read is a SIGBUS: say where
    code = under_keeper(main, rank_number(os.environ))
    # all is written, told and noted: a thread of torch's or DeepSpeed's that is still there when the process is taken
    # down aborts it now and then ("terminate called without an active exception"), after a run that went well
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
