"""Imported once by the fork server, so that a rank of a test costs a fork and not five seconds of imports."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import logging

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer as muon  # imported by every ZeRO engine, and drags in inductor
import torch
import transformers
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama

from zeropipe.trainer.distributed import prepare_backend

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
torch.set_num_threads(1)
prepare_backend()
PRELOADED = (deepspeed, muon, transformers, modeling_gpt2, modeling_llama)
