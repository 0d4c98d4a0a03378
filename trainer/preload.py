"""What every rank needs, imported once by the server that the ranks of `rank_group` are forked from."""

from .noise import quiet

quiet()  # before the libraries are imported

import deepspeed.runtime.zero.muon.muon_optimizer as muon  # noqa: E402, every ZeRO engine imports it: seconds

from . import checkpoint, engine, loop, pipe_engine  # noqa: E402
from .distributed import prepare_backend  # noqa: E402
from .models import pipeline, sequence_parallel  # noqa: E402

MODULES = (muon, checkpoint, engine, loop, pipe_engine, pipeline, sequence_parallel)
prepare_backend()
