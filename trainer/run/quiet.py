"""Silences what DeepSpeed, transformers and torch print about themselves, and keeps out what is loaded for nothing.

Errors and exceptions always come through.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from importlib.abc import MetaPathFinder

LOGGERS = ("DeepSpeed", "transformers", "datasets", "huggingface_hub", "torch.distributed", "torchao", "bitsandbytes")
# read when the library is imported, so they help only before that
ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


class ErrorsOnly(logging.Filter):
    """Drops what is less than an error. A filter outlives the level that a library sets when it is imported."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR


class NoMlflowForAutotuner(MetaPathFinder):
    """Says that there is no MLflow while DeepSpeed's autotuner is imported, which every `import deepspeed` does.

    Loading it would be 1.6 s of every start where it is installed. Who else imports it finds it.
    """

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "mlflow":
            autotuner = getattr(sys.modules.get("deepspeed.autotuning.autotuner"), "__spec__", None)
            if getattr(autotuner, "_initializing", False):
                raise ModuleNotFoundError("DeepSpeed's autotuner is not used here", name=fullname)


def quiet() -> None:
    """Silences the libraries' chatter in this process; call it before they are imported. Calling it again is harmless.

    A user who sets one of the environment variables, or PYTHONWARNINGS, gets what they asked for.
    """
    if not any(isinstance(finder, NoMlflowForAutotuner) for finder in sys.meta_path):
        sys.meta_path.insert(0, NoMlflowForAutotuner())
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(known, ErrorsOnly) for known in logger.filters):
            logger.addFilter(ErrorsOnly())
        # children (transformers.modeling_utils …) are not filtered by their parent, only levelled by it
        logger.setLevel(logging.ERROR)
    if "transformers" in sys.modules:  # imported already: its progress bars no longer heed the environment
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    if "PYTHONWARNINGS" not in os.environ:
        warnings.simplefilter("ignore", category=DeprecationWarning)
        for category in (UserWarning, FutureWarning):
            for module in (r"torch(\.|$)", r"deepspeed(\.|$)", r"transformers(\.|$)", r"accelerate(\.|$)"):
                warnings.filterwarnings("ignore", category=category, module=module)


@contextlib.contextmanager
def hushed() -> Iterator[io.StringIO]:
    """Catches what is printed inside (DeepSpeed prints pipeline tables whatever its log level); yields the text.

    Exceptions pass, and the text is printed before them, since it may explain them.
    """
    caught = io.StringIO()
    try:
        with contextlib.redirect_stdout(caught):
            yield caught
    except BaseException:
        print(caught.getvalue(), end="", flush=True)
        raise
