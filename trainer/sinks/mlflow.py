"""MLflow: every step and evaluation, to where MLFLOW_TRACKING_URI says, or to an SQLite store in the run directory."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from .base import PROJECT, SinkSettings, figures, flattened

_TAG = "zeropipe.begun"  # by which a resumed run is found again
_TOGETHER = 900  # metrics of a request, which takes 1,000
_AT_A_TIME = 100  # parameters of a request
_SECONDS = 2.0  # that a metric waits for others at most, as long as there are any


class Mlflow:
    """One MLflow run for as long as ours is resumed; parameters are the configuration that it was begun with."""

    def __init__(self, settings: SinkSettings) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        for own in ("mlflow", "alembic"):
            logging.getLogger(own).setLevel(logging.WARNING)
        mlflow: Any = import_module("mlflow")
        self._entities: Any = import_module("mlflow.entities")
        own = f"sqlite:///{settings.directory.resolve() / 'mlflow.db'}"
        self._client = mlflow.MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", own))
        self._run = self._find(settings) or self._create(settings)
        self._client.update_run(self._run, status="RUNNING")
        self._waiting: list[Any] = []
        self._sent, self._status = time.monotonic(), "FINISHED"

    def write(self, record: Mapping[str, Any], message: str | None) -> None:
        milliseconds, step = int(record["time"] * 1000), record["step"]
        metric = self._entities.Metric
        self._waiting += [metric(name, value, milliseconds, step) for name, value in figures(record).items()]
        if record.get("event") == "failed":
            self._status = "FAILED"
        if len(self._waiting) > _TOGETHER or time.monotonic() > self._sent + _SECONDS:
            self._send()

    def close(self) -> None:
        self._send()
        self._client.set_terminated(self._run, self._status)

    def _send(self) -> None:
        while self._waiting:
            self._client.log_batch(self._run, metrics=self._waiting[:_TOGETHER])
            del self._waiting[:_TOGETHER]
        self._sent = time.monotonic()

    def _find(self, settings: SinkSettings) -> str | None:
        self._experiment = self._experiment_of(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT), settings)
        found = self._client.search_runs([self._experiment], f"tags.`{_TAG}` = '{settings.begun}'", max_results=1)
        return found[0].info.run_id if found else None

    def _create(self, settings: SinkSettings) -> str:
        made = self._client.create_run(self._experiment, run_name=settings.name, tags={_TAG: settings.begun})
        parameters = [self._entities.Param(key, value) for key, value in flattened(settings.configuration).items()]
        for first in range(0, len(parameters), _AT_A_TIME):
            self._client.log_batch(made.info.run_id, params=parameters[first : first + _AT_A_TIME])
        return made.info.run_id

    def _experiment_of(self, name: str, settings: SinkSettings) -> str:
        if found := self._client.get_experiment_by_name(name):
            return found.experiment_id
        try:
            return self._client.create_experiment(name)
        except Exception:  # another run was first
            if found := self._client.get_experiment_by_name(name):
                return found.experiment_id
            raise
