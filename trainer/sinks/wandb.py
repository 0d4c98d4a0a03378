"""Weights & Biases: every step and evaluation. Where to is in its own variables: WANDB_MODE, WANDB_PROJECT …"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from .base import PROJECT, SinkSettings, figures

_SECONDS_TO_FINISH = 20.0  # what is not uploaded by then stays in the run directory, for `wandb sync`


class Wandb:
    """A run that keeps its id for as long as ours is resumed.

    W&B drops what is logged for a step that it has passed already, as a resumed run does; so the step is a column, over
    which all charts are drawn, and W&B's own counter runs on.
    """

    def __init__(self, settings: SinkSettings) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb: Any = import_module("wandb")

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", settings.name),
            dir=os.environ.get("WANDB_DIR", settings.directory),
            id=settings.begun,
            resume="allow",
            config=dict(settings.configuration),
            # of the machine, its command line and its repository it gets nothing: there may be secrets in them
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
                x_sync_dir_suffix=settings.run,  # a run that went back within a second has a folder of its own
                finish_timeout=_SECONDS_TO_FINISH,
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Mapping[str, Any], message: str | None) -> None:
        if found := figures(record):
            self._run.log({"step": record["step"], **found})

    def close(self) -> None:
        self._run.finish()
