"""The recipe: what is trained, on what, for how long. Strict and frozen; the DeepSpeed JSON says how it is laid out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ...data_prep.errors import UserError
from .bad_step import BadStepName, OnBadStep, as_type
from .errors import explain
from .fields import Choice, Count, CountOrNever, Fraction, Place, Steps, from_home
from .fields import Section as _Section
from .overrides import apply_override
from .router import Router
from .sources import Data, WeightedStore
from .text_files import parse_yaml, read_named, yaml_lines


class Model(_Section):
    init: Place = "random"
    """"random", a Hugging Face folder (safetensors), or a run directory of ours to continue from."""
    config: dict[str, Any] = Field(default_factory=dict)
    """transformers' own configuration names, e.g. {model_type: gpt2, n_layer: 12}. vocab_size comes from the store."""
    router: Router = Router()
    """Of a mixture of experts: what balances its experts, whatever the layout."""

    @model_validator(mode="after")
    def _complete(self) -> Model:
        if self.init == "random" and "model_type" not in self.config:
            raise ValueError("config.model_type is missing: state the family, e.g. {model_type: gpt2, n_layer: 12}")
        return self


class Parallel(_Section):
    pipeline: Count = 1
    """Pipeline stages. Data parallel is what is left; tensor and sequence parallel come from the DeepSpeed JSON."""
    partition: str = Field(default="parameters", pattern=r"^(parameters|uniform|measured|type:.+)$")
    """How layers are shared out over the stages: parameters, uniform, measured or type:REGEX."""
    timeout: float = Field(default=10.0, gt=0)
    """Minutes that a rank waits for the others in a step before the run ends."""
    setup_timeout: float = Field(default=60.0, gt=0)
    """Minutes that it waits while the run is set up, evaluated or saved: the slowest disk may be that much behind."""
    patience: float = Field(default=120.0, gt=0)
    """Seconds after which a rank under `launch` counts as hung, if it takes five times its longest step (evaluation,
    save) so far, or `timeout`; or `setup_timeout`, for set-up and for the first of each."""

    @model_validator(mode="after")
    def _expression_is_one(self) -> Parallel:
        try:
            re.compile(self.partition.removeprefix("type:"))
        except re.error as error:
            raise ValueError(f"partition {self.partition!r}: not a regular expression: {error}") from None
        return self


class BatchSize(_Section):
    model_config = ConfigDict(validate_by_name=True)
    global_batch: Count | None = Field(default=None, alias="global")
    """Sequences of one optimizer step, over all ranks. The micro batch comes from the DeepSpeed JSON."""


class Duration(_Section):
    steps: Count | None = None
    """Optimizer steps."""
    tokens: Count | None = None
    """Tokens to train on; rounded up to whole steps."""
    epochs: float | None = Field(default=None, gt=0)
    """Times through the train split; rounded down to whole steps."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Duration:
        stated = [key for key in ("steps", "tokens", "epochs") if getattr(self, key) is not None]
        if len(stated) != 1:
            hint = f" (duration.{stated[0]}=null takes one away)" if stated else ""
            raise ValueError(f"state exactly one of steps, tokens, epochs; got {', '.join(stated) or 'none'}{hint}")
        return self


class Hyperparameters(_Section):
    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay of matrices; norms and biases have none."""
    muon_lr: float | None = Field(default=None, gt=0)
    """Muon only: peak learning rate of the blocks' matrices; `lr` if left out, which is AdamW's of all else."""
    momentum: Fraction = 0.95
    """Muon only: decay rate of the matrices' momentum."""
    embedding_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of embedding and head; `lr` if left out. The schedule's shape is the same."""

    @property
    def embedding_rate(self) -> float:
        """Learning rate of embedding and head over that of the others."""
        return 1.0 if self.embedding_lr is None else self.embedding_lr / self.lr


class Schedule(_Section):
    type: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Shape after the warm-up."""
    warmup: Steps = 0.01
    """Steps (a whole number), or a fraction of all steps, in which the rate rises linearly from zero."""
    min_lr: float = Field(default=0.0, ge=0)
    """Where linear, cosine and wsd end."""
    decay: Steps = 0.2
    """wsd only: the steps, or the fraction of all steps, of the final decay."""

    @model_validator(mode="after")
    def _decay_is_used(self) -> Schedule:
        if "decay" in self.model_fields_set and self.type != "wsd":
            raise ValueError(f"decay is for type wsd only; {self.type} ignores it, so leave it out")
        return self


class Log(_Section):
    every: Count = 10
    """Steps between progress lines."""
    sinks: list[str] = Field(default_factory=lambda: ["tensorboard"])
    """Where the metrics go, beside metrics.jsonl and the console."""


class Eval(_Section):
    every: CountOrNever = 100
    """Steps between evaluations on the valid split; 0: never."""
    batches: Count = 10
    """Global batches of each evaluation."""
    sets: dict[str, list[WeightedStore]] = Field(default_factory=dict)
    """Further stores to evaluate on, by name, beside the valid split."""
    prompts: list[str] = Field(default_factory=list)
    """What the model is asked at each evaluation; its answers go into the log."""
    answer_tokens: Count = 48
    """The longest answer."""
    tasks: list[str] = Field(default_factory=list)
    """Tasks of EleutherAI's lm-evaluation-harness (extra: tasks): names, or task files; none that generates text."""
    task_every: Count = 1
    """Evaluations from one round of tasks to the next; the last evaluation has one in any case."""

    @model_validator(mode="after")
    def _names_are_free(self) -> Eval:
        if taken := sorted({"train", "valid", "test"} & self.sets.keys()):
            raise ValueError(f"sets.{taken[0]}: the name of a split of data; choose another")
        if self.tasks and not self.every:
            raise ValueError("tasks: nothing is evaluated where every is 0")
        if "task_every" in self.model_fields_set and self.task_every > 1 and not self.tasks:
            raise ValueError("task_every: there are no tasks")
        return self


class Save(_Section):
    every: CountOrNever = 500
    """Steps between checkpoints; 0: at the end only."""
    keep: Count = 3
    """Newest checkpoints to keep."""
    milestone: Count | None = None
    """Checkpoints of steps that are multiples of this are kept for ever beside those; a multiple of `every`."""
    background: bool = True
    """Whether training goes on while a checkpoint is written, from a copy in host memory that `plan` counts."""

    @model_validator(mode="after")
    def _milestones_are_saved(self) -> Save:
        if self.milestone is not None and not self.every:
            raise ValueError(f"milestone: {self.milestone} with every: 0, which saves at the end only; state every too")
        if self.milestone is not None and self.milestone % self.every:
            nearest = self.every * max(1, round(self.milestone / self.every))
            raise ValueError(
                f"milestone: {self.milestone} is no multiple of every ({self.every}); state e.g. {nearest}"
            )
        return self


class Recipe(_Section):
    """A run of ZeroPipe: model, data, duration and schedule. Paths are relative to the working directory."""

    name: str = Field(default="run", min_length=1)
    """Name of the run; the file's own name if left out."""
    seed: int = Field(default=1234, ge=0)
    """Everything random comes from it."""
    output: Annotated[Path, Field(strict=False), BeforeValidator(from_home)] = Path("runs/run")
    """The run directory; runs/NAME if left out."""
    model: Model
    tokenizer: Place | None = None
    """A Hugging Face tokenizer folder; the one recorded in the store if left out."""
    data: Data
    objective: Choice = "causal_lm"
    """What is learnt: a name, or a mapping of `type` and its options."""
    adapter: Choice = "none"
    """What is trained beside or instead of all weights: none, or a mapping of `type` and its options."""
    compile: Literal["none", "blocks"] = "none"
    """blocks: torch.compile of the model's blocks; the first steps take longer, the others less."""
    parallel: Parallel = Parallel()
    mlp_tile: CountOrNever = 0
    """Tokens of a rank that an MLP computes at a time, and again in the backward pass, to hold less; 0: all of them."""
    batch: BatchSize = BatchSize()
    duration: Duration
    optimizer: Hyperparameters = Hyperparameters()
    schedule: Schedule = Schedule()
    log: Log = Log()
    eval: Eval = Eval()
    save: Save = Save()
    on_bad_step: Annotated[OnBadStep, BeforeValidator(as_type, json_schema_input_type=OnBadStep | BadStepName)] = (
        OnBadStep()
    )
    """At a loss or gradient that is no number, or a loss that jumps: stop, skip or rewind; options in a mapping."""
    check_replicas: CountOrNever = 0
    """Steps between comparisons of the weights that several ranks hold copies of; 0: never."""
    resume: Place = "auto"
    """auto (newest whole checkpoint of `output`, if any), never, or a path to resume from."""

    @model_validator(mode="before")
    @classmethod
    def _output_follows_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and "output" not in values and isinstance(values.get("name"), str):
            return {**values, "output": f"runs/{values['name']}"}
        return values

    @model_validator(mode="after")
    def _ends_below_peak(self) -> Recipe:
        if self.schedule.min_lr > self.optimizer.lr and "lr" in self.optimizer.model_fields_set:
            raise ValueError(f"schedule.min_lr {self.schedule.min_lr} is above optimizer.lr {self.optimizer.lr}")
        return self

    @model_validator(mode="after")
    def _has_where_to_go_back_to(self) -> Recipe:
        if self.on_bad_step.type == "rewind" and not self.save.every:
            raise ValueError("on_bad_step: rewind goes back to a checkpoint; save.every 0 saves none before the end")
        return self


def load_recipe(path_or_name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file, or a shipped recipe by its name, and applies `section.key=value` overrides.

    Raises:
        UserError: one line that lists everything wrong in it: unknown keys, wrong types, values out of range.
    """
    text, source = read_named(path_or_name, "recipes", ".yaml")
    values = parse_yaml(text, source)
    if not isinstance(values, dict):
        raise UserError(f"{source}: a recipe is a mapping of sections; got {type(values).__name__}")
    lines = yaml_lines(text)
    for override in overrides:
        lines = apply_override(values, override, lines)
    values.setdefault("name", Path(source).stem)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, Recipe, source, lines)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back equal, with every default spelled out.

    A schedule that was never stated stays out, because the DeepSpeed JSON may hold a scheduler of its own.
    """
    values = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    # keys that the optimizer may not take stay out, as long as nobody states them
    values["optimizer"] = recipe.optimizer.model_dump(mode="json", exclude_unset=True)
    if "schedule" not in recipe.model_fields_set:
        values.pop("schedule")
    elif recipe.schedule.type != "wsd":
        values["schedule"].pop("decay")
    if "split" not in recipe.data.model_fields_set and recipe.data.shares == (1, 0, 0):
        values["data"].pop("split")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
