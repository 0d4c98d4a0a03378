"""Curves of a recipe: by plain Hugging Face and torch in one process, and by the engine of a layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..adapters.merged import first_values, initial_values
from ..anatomy.buffers import name_buffers
from ..data.batches import StepBatch
from ..engine.base import Engine, planned_rate
from ..engine.build import build_engine
from ..families.derived import Derived
from ..families.registry import family_of
from ..families.specs import parameter_table
from ..modeling.build import build_model
from ..modeling.values import all_of, fill_buffers, merge_slices
from ..plan.plan import Plan
from ..ranks.ranks import Ranks, init_distributed
from ..run.data import RunData
from ..run.quiet import quiet
from .plain import Curve, decayed_groups, train_plainly

Sabotage = Callable[[], None]  # plants a defect in a rank, for tests of the gate


def one_process(plan: Plan) -> Curve:
    """The truth: Hugging Face's model on the whole global batch at once, torch's AdamW, nothing of DeepSpeed or ours
    but the order of the data and the initial values.
    """
    ranks = init_distributed()
    model = plain_model(plan).to(ranks.device)
    params = plan.deepspeed["optimizer"]["params"]
    vocabulary = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    ids = {id(parameter) for parameter in vocabulary}
    others = decayed_groups((p for p in model.parameters() if id(p) not in ids), params["weight_decay"])
    own = decayed_groups((p for p in model.parameters() if id(p) in ids), params["weight_decay"])
    ratios = [1.0] * len(others) + [plan.recipe.optimizer.embedding_rate] * len(own)
    betas = tuple(params["betas"])
    optimizer = torch.optim.AdamW([*others, *own], lr=params["lr"], betas=betas, eps=params["eps"])

    def set_rate(step: int) -> None:
        for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
            group["lr"] = planned_rate(plan, step) * ratio

    with RunData.open(plan).stream(ranks) as stream:
        batches = (whole_batch(stream.next_step(), ranks.device) for _ in range(plan.total_steps))
        return train_plainly(model, batches, optimizer, plan.settings.clipping, set_rate)


def plain_model(plan: Plan) -> Any:
    """Hugging Face's own model of a plan, with the initial values that the plan's engine begins with."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**plan.model_config)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).train()
    init, parameters = plan.recipe.model.init, dict(model.named_parameters())
    if (held := initial_values(init)) is not None:
        name_buffers(model)
        fill_buffers(model, held)
    with torch.no_grad():
        if family_of(plan.model_config) is not None:
            values = first_values(init, plan.model_config, plan.recipe.seed)
            drawn = {spec.name: all_of(values, spec) for spec in parameter_table(plan.model_config)}
        else:
            values, seed = initial_values(init), plan.recipe.seed
            ours = build_model(plan.model_config, values, seed, torch.float32, Ranks())
            drawn = dict(ours.named_parameters())
        for name, value in drawn.items():
            parameters[name].copy_(value)
    return model


def whole_batch(step: StepBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, labels and positions of a rank's micro batches in one."""
    micros = [micro.to(device) for micro in step.micro_batches]
    positions = [micro.position_ids for micro in micros if micro.position_ids is not None]
    ids, labels = torch.cat([micro.input_ids for micro in micros]), torch.cat([micro.labels for micro in micros])
    return ids, labels, torch.cat(positions) if positions else None


def of_layout(plan: Plan, sabotage: Sabotage | None = None) -> Curve:
    """What one rank of the plan's layout sees; the weights on rank 0 only. Collective over ranks of this machine."""
    quiet()
    if sabotage is not None:
        sabotage()
    layout = plan.layout
    ranks = init_distributed(layout.tensor, layout.sequence, layout.pipeline, layout.expert)
    engine = build_engine(plan, ranks)
    stream, curve = RunData.open(plan).stream(ranks), Curve()
    for step in range(plan.total_steps):
        output = engine.train_step(stream, step)
        curve.losses.append(output.loss)
        curve.norms.append(float("nan") if output.grad_norm is None else output.grad_norm)
        if step == 0:
            curve.first, curve.torn_at_once = whole_weights(engine)
    stream.close()
    weights, curve.torn = whole_weights(engine)
    curve.weights = weights if ranks.is_main else {}
    curve.first = curve.first if ranks.is_main else {}
    return curve


def whole_weights(engine: Engine) -> tuple[dict[str, np.ndarray], list[str]]:
    """Weights by Hugging Face's names, without padding, on every rank; and the names of those whose copies on several
    ranks are not the same. Collective; for small models.
    """
    import deepspeed

    ranks, local, torn = engine.ranks, {}, set()
    for name, parameter in engine.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            piece = parameter.detach().float().contiguous().clone()
        spec = parameter.spec  # type: ignore[attr-defined]
        pieces, (_, size, group) = [piece], ranks.along(spec.axis)
        if size > 1:
            pieces = [torch.empty_like(piece) for _ in range(size)]
            dist.all_gather(pieces, piece, group=group)
        if spec.dim is None and not all(torch.equal(piece, other) for other in pieces):
            torn.add(name)
        local[name] = merge_slices(pieces, spec).cpu().numpy().copy()
    weights: dict[str, np.ndarray] = {}
    for of_rank, torn_there in ranks.gather_objects((local, torn)):
        torn |= torn_there
        for name, weight in of_rank.items():
            if name in weights and not np.array_equal(weights[name], weight):
                torn.add(name)
            weights.setdefault(name, weight)
    return weights, sorted(torn)


def masks_differ(config: dict, tensor: int, sabotage: Sabotage | None = None) -> bool:
    """Whether tensor ranks drop different attention probabilities where their heads are alike. Collective."""
    from ..modeling.derived.words import split_over_ranks
    from ..modeling.tensor_parallel import RowParallelLinear

    quiet()
    if sabotage is not None:
        sabotage()
    ranks = init_distributed(tensor)
    family = family_of(config)
    assert family is not None
    if "attention" not in family.dropout or (isinstance(family, Derived) and not family.splits_heads):
        return True  # nothing is dropped by heads of one rank
    model = build_model({**config, family.dropout["attention"]: 0.5}, None, 0, torch.float32, ranks).train()
    split_over_ranks(model, family, ranks)
    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), 0)
    seen: list[Tensor] = []
    row: nn.Module = next(module for module in model.modules() if isinstance(module, RowParallelLinear))
    row.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    torch.manual_seed(0)
    model(input_ids=torch.arange(8, device=ranks.device)[None])
    contexts = [torch.empty_like(seen[0]) for _ in range(tensor)]
    dist.all_gather(contexts, seen[0].contiguous(), group=ranks.tensor_group)
    return not any(torch.equal(contexts[0], other) for other in contexts[1:])
