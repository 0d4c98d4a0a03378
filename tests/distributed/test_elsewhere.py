"""Every path of a step, forward and backward, on a device without values: nothing of it may be left on the host, and
nothing may wait for the device. Of each path a defect is planted, a tensor left on the host, and seen.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import tiny
from tests.elsewhere import NAME, Elsewhere, silent_collectives, the_device
from tests.harness import run_ranks
from tests.tiny import plan_of, tiny_json, tiny_recipe, tiny_records, tiny_store

pytestmark = pytest.mark.distributed

GPT2, LLAMA = {**tiny.GPT2, "n_layer": 1}, {**tiny.LLAMA, "num_hidden_layers": 1}
LORA = {"adapter": {"type": "lora", "r": 4}}
DOCUMENTS = {"data": {"document_mask": True}}
SFT, DPO = {"objective": "sft"}, {"objective": "dpo"}
ROOM = "zeropipe.trainer."
# planted in the forward pass alone: what raises in the backward pass may end the process, from a thread of torch's own
# path: the model; sections of the recipe; keys of the JSON; which records; where a defect is planted
PATHS: dict[str, tuple[dict, dict, dict, str, str]] = {
    "plain": (LLAMA, {}, {}, "text", "modeling.causal:head_token_losses"),
    "dropout": (GPT2, {}, {}, "text", "modeling.attention:_causal"),
    "bf16": (LLAMA, {}, {"bf16": {"enabled": True}}, "text", "modeling.cross_entropy:Scoring.losses_and_slope"),
    "autocast": (LLAMA, {}, {"torch_autocast": {"enabled": True}}, "text", "modeling.causal:head_token_losses"),
    "documents": (LLAMA, DOCUMENTS, {}, "text", "modeling.attention:_one_after_the_other"),
    "documents by the kernel": (GPT2, DOCUMENTS, {}, "text", "modeling.attention:_in_one_kernel"),
    "recomputed": (LLAMA, {}, {"activation_checkpointing": {}}, "text", "modeling.causal:head_token_losses"),
    "packed sft": (LLAMA, SFT, {}, "sft", "modeling.attention:_one_after_the_other"),
    "padded sft": (LLAMA, {**SFT, "data": {"packing": "none"}}, {}, "sft", "modeling.cross_entropy:head_token_losses"),
    "neftune": (LLAMA, {"objective": {"type": "sft", "neftune": 5}}, {}, "sft", "data.noise:embedding_noise"),
    "dpo": (LLAMA, DPO, {}, "dpo", "objectives.dpo:text_sums"),
    "lora": (LLAMA, LORA, {}, "text", "adapters.lora:_forward"),
    "z-loss": (
        LLAMA,
        {"objective": {"type": "causal_lm", "z_loss": 1e-4, "label_smoothing": 0.1}},
        {},
        "text",
        "modeling.cross_entropy:Scoring.losses_and_slope",
    ),
    "tiles": (LLAMA, {"mlp_tile": 16}, {}, "text", "modeling.tiles:_in_tiles"),
    "chunks": (LLAMA, {}, {}, "text", "modeling.cross_entropy:Scoring.losses_and_slope"),
    "chunks, recomputed": (LLAMA, DPO, {}, "dpo", "modeling.cross_entropy:checkpoint"),
    "tensor": (GPT2, {}, {"tensor_parallel": {"autotp_size": 2}}, "text", "modeling.tensor_parallel:_reduce"),
    "tensor, one kv head": (
        {**LLAMA, "num_key_value_heads": 1},
        {},
        {"tensor_parallel": {"autotp_size": 2}},
        "text",
        "modeling.tensor_parallel:RowParallelLinear.forward",
    ),
    "sequence": (LLAMA, {}, {"sequence_parallel_size": 2}, "text", "modeling.sequence_parallel:_local_attention"),
    "pipeline": (tiny.LLAMA, {**DOCUMENTS, "parallel": {"pipeline": 2}}, {}, "text", "modeling.pipeline:Block.forward"),
    "pipeline, tied": (tiny.GPT2, {"parallel": {"pipeline": 2}}, {}, "text", "modeling.pipeline:Positions.forward"),
    "any family": ({**LLAMA, "model_type": "mistral"}, {}, {}, "text", "modeling.causal:token_losses"),
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("elsewhere")
    return {
        "text": tiny_store(folder / "text"),
        "sft": tiny_records(folder / "sft"),
        "dpo": tiny_records(folder / "dpo", "dpo", longest=14),
    }


def _steps(paths: list[str], stores: dict[str, Path], planted: bool) -> dict[str, str]:
    """What a step of every path came to: nothing, or the error."""
    from unittest.mock import patch

    from zeropipe.trainer.run.quiet import quiet

    quiet()
    device, found = the_device(), {}
    for path in paths:
        plant = PATHS[path][-1]
        places = [patch.multiple(ROOM + "modeling.chunks", CHUNK_BYTES=1 << 14, BUSY_ROWS=1)]
        if "chunks" not in path:
            places = []
        if "kernel" in path:
            places.append(patch(ROOM + "modeling.attention._has_kernel", lambda *_: True))
        if planted:
            places.append(_left_on_the_host(plant))
        for place in places:
            place.start()
        try:
            (_pipeline_step if "pipeline" in path else _step)(path, stores, device)
            found[path] = ""
        except Exception as error:
            found[path] = f"{type(error).__name__}: {error}"
        finally:
            for place in reversed(places):
                place.stop()
    return found


def _left_on_the_host(where: str) -> Any:
    """What a function gives has a tensor of the host in it."""
    from unittest.mock import patch

    module, _, name = where.partition(":")
    owner: Any = importlib.import_module(ROOM + module)
    *classes, leaf = name.split(".")
    for part in classes:
        owner = getattr(owner, part)
    real = getattr(owner, leaf)

    def planted(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        first = result[0] if isinstance(result, tuple) else result
        spoilt = first + torch.zeros(3, 1)[:1]
        return (spoilt, *result[1:]) if isinstance(result, tuple) else spoilt

    return patch.object(owner, leaf, staticmethod(planted) if isinstance(vars(owner)[leaf], staticmethod) else planted)


class Plain:
    """In the place of DeepSpeed's engine: the module, and a step that does nothing."""

    def __init__(self, module: torch.nn.Module, autocast: bool) -> None:
        self.module, self.autocast, self.optimizer = module, autocast, SimpleNamespace(param_groups=[])

    def __call__(self, *inputs: Any) -> Any:
        with torch.autocast(NAME, torch.bfloat16, enabled=self.autocast):
            return self.module(*inputs)

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None: ...

    def get_global_grad_norm(self) -> None: ...


def _step(path: str, stores: dict[str, Path], device: torch.device) -> None:
    from dataclasses import replace
    from unittest.mock import patch

    from zeropipe.trainer.engine.base import Engine
    from zeropipe.trainer.engine.zero import ZeroEngine
    from zeropipe.trainer.ranks.ranks import Ranks
    from zeropipe.trainer.run.data import RunData

    model, sections, keys, reads, _ = PATHS[path]
    size = 2 if path.startswith(("tensor", "sequence")) else 1
    sections = {**sections, "model": {"config": model}, "batch": {"global": 4}}
    recipe = tiny_recipe(stores[reads], stores[reads].parent / "run", **sections)
    if reads != "text":
        recipe["data"].pop("split", None)
    plan = plan_of(recipe, tiny_json("zero1", 4, **keys), size)
    tensor, sequence = plan.layout.tensor, plan.layout.sequence
    group: Any = object()
    ranks = Ranks(world=size, tensor_size=tensor, sequence_size=sequence, tensor_group=group, sequence_group=group)
    batch = RunData.open(plan).stream(ranks).next_step()
    ranks = replace(ranks, device=device)
    plain = lambda self, config, mpu=None: Plain(self.module, plan.precision.autocast)  # noqa: E731
    stand_in = patch.object(Engine, "_initialize", plain)
    with Elsewhere(), silent_collectives(size), stand_in:
        engine = ZeroEngine(plan, ranks)
        sums, _ = engine._update(batch, 0, 8.0)
        trained = [p for p in engine.module.parameters() if p.requires_grad]
        assert sums.device.type == NAME and trained
        for tensor in [*engine.module.parameters(), *engine.module.buffers(), *(p.grad for p in trained)]:
            assert tensor is not None and tensor.device.type == NAME


def _pipeline_step(path: str, stores: dict[str, Path], device: torch.device) -> None:
    """All layers in a row; between two stages, and in DeepSpeed's schedule, nothing is made."""
    from dataclasses import replace
    from functools import partial
    from unittest.mock import patch

    from zeropipe.trainer.modeling.attention import text_lengths
    from zeropipe.trainer.modeling.pipeline import Builder, StageLoss, as_linear
    from zeropipe.trainer.ranks.ranks import Ranks
    from zeropipe.trainer.run.data import RunData

    model, sections, keys, reads, _ = PATHS[path]
    recipe = tiny_recipe(stores[reads], stores[reads].parent / "run", **{**sections, "model": {"config": model}})
    plan = plan_of(recipe, tiny_json("zero1", 4, **keys), 2)
    micro = RunData.open(plan).stream(Ranks()).next_step().micro_batches[0]
    ranks, lengths = replace(Ranks(), device=device), text_lengths(micro.position_ids)
    # positions travel with the activations, so that a stage waits for their lengths, once for each micro batch
    with Elsewhere(), patch(ROOM + "modeling.pipeline.text_lengths", lambda positions: lengths):
        builder = Builder(plan.model_config, None, 0, torch.float32, ranks)
        layers = [spec.build() for spec in builder.layers()]
        loss = StageLoss(builder, lambda tensors, losses: losses.sum(), False, uniform=True)
        head = partial(builder.layers()[-1].forward_fn, layers[0]) if builder.tied else layers[-1]
        loss.head = as_linear(head)
        positions = torch.arange(plan.seq_len).expand_as(micro.input_ids)
        carried: Any = micro.input_ids.to(device), positions.to(device)
        for layer in layers[:-1]:
            carried = layer(carried)
        loss(carried, (micro.labels.to(device),)).backward()
        parts = layers[:-1] if builder.tied else layers
        for parameter in (parameter for part in parts for parameter in part.parameters()):
            assert parameter.device.type == NAME and parameter.grad is not None and parameter.grad.device.type == NAME


def test_nothing_is_left_on_the_host(stores):
    [found] = run_ranks(1, _steps, list(PATHS), stores, False, timeout=800)
    assert found == dict.fromkeys(PATHS, "")


def test_what_is_left_on_the_host_is_seen_on_every_path(stores):
    [found] = run_ranks(1, _steps, list(PATHS), stores, True, timeout=800)
    assert {path: error for path, error in found.items() if "two devices" not in error} == {}
