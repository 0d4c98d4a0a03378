"""`zeropipe plan`: what a recipe and a DeepSpeed JSON come to on a number of devices, without starting anything."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING

from ..trainer.commands.arguments import add_run_arguments, add_verb
from .command import Launch, deepspeed_command

if TYPE_CHECKING:
    from ..trainer.plan.plan import Plan

_EPILOG = """\
examples:
  zeropipe plan gpt2_345m --deepspeed_config zero2 --devices 2
  zeropipe plan my.yaml --deepspeed_config my.json --devices 16 batch.global=512 --json

Needs the token stores, but no GPU; and torch only for a family without a written record (all but gpt2 and llama), whose
record is derived with it: some seconds more. What cannot run is refused here, with what to do instead.
"""


def register(verbs: argparse._SubParsersAction) -> None:
    text = "show layout, batches, steps and memory of a run, or why it cannot be run"
    parser = add_verb(verbs, "plan", run, text, __doc__, _EPILOG)
    add_run_arguments(parser)
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="ranks in all, on all hosts; default 1")
    parser.add_argument("--json", action="store_true", help="print the DeepSpeed JSON that the run would use")


def run(args: argparse.Namespace) -> int:
    import json

    from ..trainer.plan.deepspeed_json import load_pair
    from ..trainer.plan.plan import make_plan

    plan = make_plan(*load_pair(args.recipe, args.deepspeed_config, args.overrides), args.devices)
    if args.json:
        print(json.dumps(plan.deepspeed, indent=2))
        return 0
    for name, value in plan_rows(plan):
        print(f"{name:<14} {value}")
    print("\nto run it\n  " + "\n  ".join(launch_lines(args)))
    return 0


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """Name and value of each line of the table."""
    recipe, config = plan.recipe, plan.model_config
    parameters = f"{plan.parameters:,} parameters" if plan.parameters else "parameters not known for this family"
    if plan.parameters and plan.frozen:
        parameters = f"{plan.parameters:,} parameters trained, {plan.frozen:,} frozen"
    vocabulary = f"vocabulary {plan.vocab_size:,}"
    if plan.padded_vocab_size != plan.vocab_size:
        vocabulary += f", trained as {plan.padded_vocab_size:,}"
    init = "" if recipe.model.init == "random" else f", from {recipe.model.init}"
    return [
        ("run", f"{recipe.name} -> {recipe.output}"),
        ("model", f"{config['model_type']}, {parameters}, {vocabulary}{init}"),
        *_record(plan),
        *_experts(plan),
        ("layout", f"{plan.layout.world} devices: {plan.layout}, {plan.precision}"),
        *_records(plan),
        ("batch", _batch(plan)),
        *_sums(plan),
        ("steps", f"{plan.total_steps:,} = {plan.positions:,} sequence positions{_epochs(plan)}"),
        ("schedule", _schedule(plan)),
        ("optimizer", _optimizer(plan)),
        *_memory(plan),
    ]


def launch_lines(args: argparse.Namespace) -> list[str]:
    """The command on one machine, ours and DeepSpeed's own."""
    config = ["--deepspeed_config", args.deepspeed_config]
    launch = Launch(("--run", args.recipe, *config, *args.overrides), args.devices)
    ours = ["zeropipe", "launch", args.recipe, *config, "--devices", str(args.devices), *args.overrides]
    return [shlex.join(ours), shlex.join(deepspeed_command(launch))]


def _record(plan: Plan) -> list[tuple[str, str]]:
    """Where what is known of the family comes from, if nobody wrote it down."""
    from ..trainer.families.derived import Derived
    from ..trainer.families.registry import family_of

    if not isinstance(family_of(plan.model_config), Derived):
        return []
    return [("record", "derived from transformers' declarations and its model's shapes; torch was imported for it")]


def _experts(plan: Plan) -> list[tuple[str, str]]:
    """Of a mixture: how much of it a token meets, and how many tokens an expert would get."""
    from ..trainer.plan.experts import experts_of

    found = experts_of(plan.model_config)
    if found is None:
        return []
    share = plan.micro_batch * plan.seq_len * found.chosen / found.each_layer * plan.layout.expert
    of = "a micro batch" if plan.layout.expert == 1 else f"the micro batches of {plan.layout.expert} ranks"
    here = found.each_layer // plan.layout.expert
    shared = "" if plan.layout.expert == 1 else f", {here} of each layer on a rank"
    return [
        (
            "experts",
            f"{found.chosen} of {found.each_layer} for a token in {found.layers} layers: {found.active:,} of "
            f"{found.total:,} parameters at work{shared}; balanced, each gets {share:,.0f} tokens of {of}",
        )
    ]


def _records(plan: Plan) -> list[tuple[str, str]]:
    if not plan.records:
        return []
    how = plan.recipe.data.packing or "best_fit"
    return [
        ("records", f"{plan.records:,} in {plan.samples:,} samples ({how}), {plan.filled:.0%} of their places used")
    ]


def _batch(plan: Plan) -> str:
    return (
        f"{plan.global_batch} sequences of {plan.seq_len} = micro batch {plan.micro_batch} x accumulation "
        f"{plan.accumulation} x data parallel {plan.layout.data}"
    )


def _sums(plan: Plan) -> list[tuple[str, str]]:
    """What gradients are added up in, where that loses terms: in bf16 by default."""
    name = plan.precision.name
    if plan.accumulation == 1 or name not in ("bf16", "fp16"):
        return []
    if plan.settings.sum_width > plan.precision.width:
        return [("gradients", f"in {name}, those of {plan.accumulation} micro batches summed in fp32")]
    other = "torch_autocast" if name == "fp16" or plan.layout.pipeline > 1 else "data_types.grad_accum_dtype fp32"
    return [
        ("gradients", f"{plan.accumulation} micro batches are summed in {name}, which loses terms; exactly: {other}")
    ]


def _epochs(plan: Plan) -> str:
    return f" = {plan.total_steps * plan.global_batch / plan.samples:.3g} epochs of {plan.samples:,} samples"


def _schedule(plan: Plan) -> str:
    if own := plan.settings.scheduler:
        return f"{own.get('type')}, the DeepSpeed JSON's own (the recipe's schedule is not used)"
    schedule = plan.recipe.schedule
    text = f"{schedule.type}, {plan.warmup_steps:,} steps of warm-up"
    if schedule.type == "constant":
        return text
    return f"{text}, {plan.decay_steps:,} steps down to {schedule.min_lr:g}"


def _optimizer(plan: Plan) -> str:
    settings = plan.settings
    said = {key.replace("_", " "): settings.optimizer_params[key] for key in settings.optimizer.keys if key != "eps"}
    numbers = [f"{key} {value if isinstance(value, list) else f'{value:g}'}" for key, value in said.items()]
    clipping = f"clipped at {settings.clipping:g}" if settings.clipping else "not clipped"
    return ", ".join([settings.optimizer_type, *numbers, clipping])


def _memory(plan: Plan) -> list[tuple[str, str]]:
    from ..data_prep.sizes import format_bytes
    from ..trainer.plan.memory import memory_rows

    if plan.memory is None:
        return [("memory", "not known for this family")]
    lines = [(f"  {name}", size) for name, size in memory_rows(plan.memory)]
    total = f"{format_bytes(plan.memory.peak)} at the peak on each device"
    if host := plan.memory.host + plan.memory.snapshot:
        total += f", and {format_bytes(host)} of its host"
    return [("memory", total), *lines]
