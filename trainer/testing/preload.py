"""What every rank needs, imported once by the server that the ranks of `local_ranks` are forked from."""

from ..run.quiet import quiet

quiet()  # before the libraries are imported

from .. import loop  # noqa: E402
from ..engine import pipeline as pipeline_engine  # noqa: E402
from ..modeling import pipeline, sequence_parallel  # noqa: E402
from ..ranks.ranks import prepare_backend  # noqa: E402

MODULES = (loop, pipeline_engine, pipeline, sequence_parallel)
prepare_backend()
