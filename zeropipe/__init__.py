"""ZeroPipe from Python: what the verbs do, for notebooks, sweeps, and process groups that somebody else has made.

What the user did wrong is a `UserError`; torch and DeepSpeed are imported when something needs them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zeropipe.data_prep.errors import UserError

if TYPE_CHECKING:
    import pyarrow

    from zeropipe.trainer.evaluation.evaluate import Evaluation
    from zeropipe.trainer.evaluation.generation import Generated
    from zeropipe.trainer.export.huggingface import Exported
    from zeropipe.trainer.plan.plan import Plan
    from zeropipe.trainer.recipe.recipe import Recipe

__all__ = ["Run", "UserError", "evaluate", "export", "generate", "load_recipe", "make_plan", "open_run", "train"]

_LONGEST = 20 * 24 * 3600.0  # seconds that `train` waits for ranks of its own


@dataclass(frozen=True)
class Run:
    """A run directory, read from outside; the run may be under way."""

    path: Path

    @property
    def recipe(self) -> Recipe:
        """As the run resolved it; its stores found from here."""
        from zeropipe.trainer.run.directory import load_run_recipe

        return load_run_recipe(self.path)

    @property
    def checkpoints(self) -> list[Path]:
        """Those that can be seen to be whole, oldest first."""
        from zeropipe.trainer.checkpoint.folder import ls

        return [item.path for item in ls(self.path) if item.problem is None]

    def metrics(self, kind: str = "train") -> pyarrow.Table:
        """The record, a row each, of what counts: what a dead run did beyond its last checkpoint is left out.

        Args:
            kind: "train" (steps), "eval", "task" or "event". `.to_pandas()` makes a data frame of the table.

        Raises:
            UserError: there is no metrics.jsonl, or it is damaged.
        """
        import pyarrow

        from zeropipe.trainer.metrics.reading import read_metrics

        rows = [record for record in read_metrics(self.path) if record["kind"] == kind]
        columns = dict.fromkeys(key for row in rows for key in row)
        return pyarrow.table({key: [row.get(key) for row in rows] for key in columns})


def open_run(path: str | Path) -> Run:
    """A run directory.

    Raises:
        UserError: it is none.
    """
    if not (Path(path) / "recipe.yaml").is_file():
        raise UserError(f"{path}: no run directory, which has a recipe.yaml")
    return Run(Path(path))


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe file, or a shipped recipe by its name, with `section.key=value` overrides.

    Raises:
        UserError: it lists everything that is wrong in it.
    """
    from zeropipe.trainer.recipe.recipe import load_recipe as load

    return load(str(path_or_name), overrides)


def make_plan(
    recipe: Recipe, deepspeed_config: str | Path = "zero0", devices: int = 1, overrides: Sequence[str] = ()
) -> Plan:
    """Layout, batches, steps and memory of a run. Needs neither torch nor a GPU.

    Args:
        deepspeed_config: a DeepSpeed JSON file, or a shipped one's name.
        devices: ranks, over all hosts.
        overrides: `section.key=value` of the JSON.

    Raises:
        UserError: it cannot be run, and why.
    """
    from zeropipe.trainer.plan.deepspeed_json import load_ds_config
    from zeropipe.trainer.plan.plan import make_plan as plan

    return plan(recipe, load_ds_config(str(deepspeed_config), overrides), devices)


def train(
    recipe: Recipe, deepspeed_config: str | Path = "zero0", devices: int = 1, overrides: Sequence[str] = ()
) -> Run:
    """Trains to the recipe's end, or goes on where its `resume` says.

    In a process group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun and
    Ray set them), this process is one of its ranks, every rank calls this, and `devices` is not heard. Otherwise
    `devices` ranks of this machine are started; hosts, restarts and hangs are for `zeropipe launch`.

    Args:
        deepspeed_config, overrides: as for `make_plan`.

    Raises:
        UserError: something is wrong with the recipe, the JSON or the data.
        RuntimeError: a rank failed; the message has its traceback.
    """
    from zeropipe.trainer.plan.deepspeed_json import load_ds_config

    ds = load_ds_config(str(deepspeed_config), overrides)
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        _train(recipe, ds)
        return Run(recipe.output)
    make_plan(recipe, deepspeed_config, devices, overrides)  # what is wrong is said here, not by a rank
    from zeropipe.trainer.testing.local_ranks import RankFailed, on_local_ranks

    try:
        on_local_ranks(devices, _train, recipe, ds, timeout=_LONGEST)
    except RankFailed as error:
        raise RuntimeError(str(error)) from None
    return Run(recipe.output)


def _train(recipe: Recipe, ds: dict[str, Any]) -> None:
    from datetime import timedelta

    from zeropipe.trainer.run.quiet import quiet

    quiet()
    from zeropipe.trainer.loop import train as run
    from zeropipe.trainer.plan.plan import make_plan as plan_of
    from zeropipe.trainer.ranks.ranks import join_world

    ranks = join_world(timedelta(minutes=recipe.parallel.timeout))
    plan = ranks.together(lambda: plan_of(recipe, ds, ranks.world))
    layout = plan.layout
    run(plan, ranks.lay_out(layout.tensor, layout.sequence, layout.pipeline))


def evaluate(
    model: str | Path,
    split: str = "valid",
    store: str | Path | None = None,
    batches: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
) -> Evaluation:
    """Loss, perplexity and bits per byte on held-out tokens, as `zeropipe eval` gives them.

    Args:
        model: a run directory, a checkpoint, or a Hugging Face folder.
        split: "valid" or "test", of the run's data.
        store: a whole token store instead.
        batches: global batches; None: all of them.

    Raises:
        UserError: there is nothing to evaluate, or on.
    """
    from zeropipe.trainer.evaluation.evaluate import compared, evaluate_model
    from zeropipe.trainer.evaluation.held_out import held_out_data
    from zeropipe.trainer.export.load import load_model, pick_device

    data = held_out_data(Path(model), split, None if store is None else str(store), None)
    place = pick_device(device)
    if data.objective.reference:
        if data.initial is None:
            raise UserError(f"{data.name}: preferences are compared with the model before the run, which is not known")
        data = compared(data, load_model(data.initial, dtype)[0].to(place))
    return evaluate_model(load_model(model, dtype)[0].to(place), data, batches)


def generate(
    model: str | Path, prompts: Sequence[str], dtype: str | None = None, device: str | None = None, **sampling: Any
) -> list[Generated]:
    """What a model writes after prompts.

    Args:
        model: a run directory, a checkpoint, a Hugging Face folder, or a peft adapter's.
        sampling: `max_new_tokens`, `temperature` (0: greedy), `top_k`, `top_p`, `seed`.

    Raises:
        UserError: nothing to load, or sampling that makes no sense.
    """
    from zeropipe.trainer.evaluation.generation import Sampling
    from zeropipe.trainer.evaluation.generation import generate as write
    from zeropipe.trainer.export.adapted import load_model_or_adapter
    from zeropipe.trainer.export.load import pick_device

    how, place = Sampling(**sampling), pick_device(device)
    loaded, tokenizer = load_model_or_adapter(Path(model), dtype or ("float32" if place.type == "cpu" else None), None)
    return write(loaded.to(place), tokenizer, prompts, how)


def export(run: str | Path, output: str | Path | None = None, **options: Any) -> Exported:
    """Writes a Hugging Face folder with its model card and provenance, verified against training.

    Args:
        run: a run directory or a checkpoint.
        output: RUN/export by default.
        options: of `zeropipe.trainer.export.huggingface.export`: dtype, overwrite, gguf, …

    Raises:
        UserError: nothing to export, `output` is there already, or the folder is not what training had.
    """
    from zeropipe.trainer.export.huggingface import export as write

    return write(run, output, **options)
