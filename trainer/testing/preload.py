"""What every rank needs, imported once by the server that the ranks of `local_ranks` are forked from."""

import gc

from ..run.quiet import quiet

quiet()  # before the libraries are imported

import torch.utils.tensorboard as tensorboard  # noqa: E402
from transformers.models.gpt2 import modeling_gpt2  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from .. import loop  # noqa: E402
from ..engine import pipeline as pipeline_engine  # noqa: E402
from ..families.declared import declared_default  # noqa: E402
from ..modeling import pipeline, sequence_parallel  # noqa: E402
from ..ranks.ranks import prepare_backend  # noqa: E402

MODULES = (loop, pipeline_engine, pipeline, sequence_parallel, tensorboard, modeling_gpt2, modeling_llama)
for model_type in ("gpt2", "llama"):
    declared_default(model_type, "pad_token_id")  # which remembers what it read of transformers
prepare_backend()
# what is imported stays: a collection in a rank (DeepSpeed's ZeRO-3 forces one) neither walks nor copies it
gc.collect()
gc.freeze()
