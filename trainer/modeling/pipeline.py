"""Hugging Face's own blocks as the layers of a pipeline.

Position ids travel with the activations; masks and rotary tables are made from them once per stage and micro batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..anatomy.outline import Call, Outline
from ..data.noise import with_noise
from ..families.registry import family_of
from ..families.specs import ParamSpec
from ..ranks.ranks import Ranks
from .attention import text_lengths
from .build import drawn_values, make_parameter, model_and_specs
from .cross_entropy import Scoring, head_token_losses, shaped
from .derived.words import split_over_ranks
from .partition import stage_bounds
from .penalty import NO_PENALTY, Penalty
from .values import Values, make_buffers, put_off

Carried = tuple[Tensor, Tensor]  # hidden states [batch, time, width], position ids [batch, time]


class Builder:
    """Makes the layers of this rank's stage, and holds what they share."""

    def __init__(
        self,
        config: Mapping[str, Any],
        values: Values | None,
        seed: int,
        dtype: torch.dtype,
        ranks: Ranks,
        checkpointing: bool = False,
        adapt: Callable[[nn.Module], None] = lambda module: None,
        convert: Callable[[nn.Module], nn.Module] = lambda module: module,
        packs: Callable[[ParamSpec], bool] = lambda spec: False,
    ) -> None:
        """Arguments as `build_model`; `checkpointing`: blocks compute again in backward; `adapt` gets every part."""
        self.adapt, self.convert, self.packs, family = adapt, convert, packs, family_of(config)
        assert family is not None and family.blocks is not None and family.norm is not None, "plans refuse it"
        self.family, self.blocks, self.last_norm = family, family.blocks, family.norm
        self._model, self.specs = model_and_specs(config, ranks.tensor_size)
        make_buffers(self._model, values, ranks.device)
        self.values, self.dtype, self.ranks = values or put_off(drawn_values(config, seed)), dtype, ranks
        self.vocab_size, self.shape = config["vocab_size"], family.shape or (1.0, 0.0)
        self.config: Any = self._model.config.get_text_config()
        self.columns, self.width = self._model.get_input_embeddings().weight.shape
        self.tied, self.checkpointing = f"{family.head}.weight" not in self.specs, checkpointing
        self.outline = Outline(self._model, self.blocks, family.embedding, self.last_norm)
        # what has weights before the blocks, beside the embedding
        self.before = [name for name in self.outline.outside if any(s.startswith(f"{name}.") for s in self.specs)]
        self._memo: tuple[Tensor, int, list[Call]] | None = None

    def make(self, name: str) -> nn.Module:
        """A part of the model, called `name` by Hugging Face, with its values and its share of the tensor ranks."""
        holder = nn.Sequential(self._model.get_submodule(name))  # so that the part itself can be replaced
        for path, module in list(holder[0].named_modules()):
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    spec = self.specs[".".join(filter(None, (name, path, key)))]
                    made = make_parameter(spec, self.values, self.dtype, self.ranks, self.packs(spec))
                    module._parameters[key] = made
            if (converted := self.convert(module)) is not module:
                holder[0].set_submodule(path, converted)
        split_over_ranks(holder, self.family, self.ranks, name)
        self.adapt(holder[0])
        return holder[0]

    def begin(self, hidden: Tensor, positions: Tensor, training: bool) -> Tensor:
        """What goes into the first block, from what came out of the embedding."""
        calls = self._run(hidden, positions, training)
        self._keep(positions, calls)
        return calls[0].hidden

    def inputs_of(self, layer: int, hidden: Tensor, positions: Tensor) -> Call:
        """Masks, rotary tables and what else a block reads; made anew only when the positions are others."""
        if self._memo is None or self._memo[0] is not positions or self._memo[1] != positions._version:
            with torch.no_grad():
                self._keep(positions, self._run(hidden, positions, False))
        assert self._memo is not None
        return self._memo[2][layer]

    def _keep(self, positions: Tensor, calls: list[Call]) -> None:
        """Without the hidden states, which would keep the graph that made them."""
        self._memo = positions, positions._version, [replace(call, hidden=positions) for call in calls]

    def _run(self, hidden: Tensor, positions: Tensor, training: bool) -> list[Call]:
        mask = text_lengths(positions) if self.family.by_text else None
        return self.outline.run(hidden, positions, mask, training)[0]

    def layers(self) -> list[LayerSpec]:
        """The whole model as layers, none of them made yet."""
        embedding = functools.partial(TiedLayerSpec, "embedding", Embedding, self, tied_weight_attr="table.weight")
        first = [embedding() if self.tied else LayerSpec(Embedding, self)]
        first += [LayerSpec(Positions, self)] if self.before else []
        blocks = [LayerSpec(Block, self, layer) for layer in range(self.config.num_hidden_layers)]
        last = LayerSpec(Norm, self), embedding(forward_fn=_tied_head) if self.tied else LayerSpec(Head, self)
        return [*first, *blocks, *last]

    def layer_names(self) -> list[list[str]]:
        """Hugging Face's names of every layer's parts."""
        family = self.family
        first = [[family.embedding], *([self.before] if self.before else [])]
        blocks = [[f"{self.blocks}.{layer}"] for layer in range(self.config.num_hidden_layers)]
        return [*first, *blocks, [self.last_norm], [family.embedding if self.tied else family.head]]

    def layer_kinds(self) -> list[str]:
        """What every layer is. A tied head is an embedding to DeepSpeed, and a head to us."""
        return [*(spec.typename.__name__ for spec in self.layers()[:-1]), "Head"]

    def layer_sizes(self) -> list[int]:
        """Parameters of every layer."""
        inside = [tuple(f"{name}." for name in names) for names in self.layer_names()]
        return [sum(spec.numel for spec in self.specs.values() if spec.name.startswith(names)) for names in inside]


class Embedding(nn.Module):
    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self.table = builder.make(builder.family.embedding)
        self.begin = None if builder.before else builder.begin  # else the next layer does

    def forward(self, inputs: tuple[Tensor, ...]) -> Carried:
        ids, positions, *noise = inputs  # noise in training alone, if at all
        hidden = self.table(ids)
        hidden = with_noise(hidden, *noise) if noise else hidden
        return hidden if self.begin is None else self.begin(hidden, positions, self.training), positions


class Positions(nn.Module):
    """What has weights between embedding and blocks: learnt positions, norms."""

    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self.parts = nn.ModuleList(builder.make(name) for name in builder.before)
        for name, part in zip(builder.before, self.parts, strict=True):
            builder.outline.install(name, part)
        self.begin = builder.begin

    def forward(self, inputs: Carried) -> Carried:
        hidden, positions = inputs
        return self.begin(hidden, positions, self.training), positions


class Block(nn.Module):
    def __init__(self, builder: Builder, layer: int) -> None:
        super().__init__()
        self.block: Any = builder.make(f"{builder.blocks}.{layer}")
        self.layer, self.inputs_of = layer, builder.inputs_of
        if builder.checkpointing:
            self.block.gradient_checkpointing = True
            self.block._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)

    def forward(self, inputs: Carried) -> Carried:
        hidden, positions = inputs
        call = self.inputs_of(self.layer, hidden, positions)
        output = self.block(hidden, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output, positions


class Norm(nn.Module):
    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self.norm = builder.make(builder.last_norm)

    def forward(self, inputs: Carried) -> Tensor:
        return self.norm(inputs[0])


class Head(nn.Module):
    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self.linear = builder.make(builder.family.head)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden)


def _tied_head(embedding: Embedding, hidden: Tensor) -> Tensor:
    return F.linear(hidden, embedding.table.weight)  # type: ignore[arg-type]


def as_linear(head: Any) -> nn.Linear:
    """The head of a pipeline, made by itself or tied to the embedding that it is called with."""
    if isinstance(head, Head):
        return head.linear  # type: ignore[return-value]
    (embedding,) = head.args
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = embedding.table.weight  # the very parameter
    return linear


class StageLoss:
    """Head and objective of the last stage, scaled so that DeepSpeed's mean over micro batches and data-parallel ranks
    is the mean over the weight of the global batch.

    Args:
        loss: a micro batch's tensors (labels first) and its token losses, to the scalar that is trained on.
        penalty, uniform, sparse: as `CausalLM`.
    """

    def __init__(
        self,
        builder: Builder,
        loss: Callable[[Sequence[Tensor], Tensor], Tensor],
        autocast: bool,
        penalty: Penalty = NO_PENALTY,
        uniform: bool = False,
        sparse: bool = False,
    ) -> None:
        self.builder, self.loss, self.autocast, self.scale = builder, loss, autocast, 1.0
        self.penalty, self.uniform, self.sparse = penalty, uniform, sparse
        self.head: nn.Linear | None = None  # of the last stage

    def __call__(self, hidden: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        return self.loss(tensors, self.token_losses(hidden, tensors[0], self.penalty)) * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """This tensor rank's columns of all logits [batch, time, columns]."""
        assert self.head is not None
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=self.autocast):
            return shaped(self.head(hidden), *self.builder.shape)

    def token_losses(self, hidden: Tensor, labels: Tensor, penalty: Penalty = NO_PENALTY) -> Tensor:
        """Nats of every label [batch, time]."""
        assert self.head is not None
        builder = self.builder
        scoring = Scoring(builder.vocab_size, builder.columns, builder.ranks, penalty, *builder.shape)
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=self.autocast):
            return head_token_losses(self.head, hidden, labels, scoring, self.uniform, self.sparse)


class Stages(PipelineModule):
    """The layers of this rank's stage, ready for DeepSpeed's PipelineEngine.

    The last stage's output is what goes into the head: the loss applies the head itself, chunk by chunk, so that the
    logits of a whole micro batch are never held.
    """

    def __init__(self, builder: Builder, loss: StageLoss, method: str, costs: Sequence[float] | None = None) -> None:
        """Collective.

        Args:
            loss: of the last stage, which gives it its head.
            method: `parallel.partition` of the recipe.
            costs: seconds of every layer, for the method `measured`.

        Raises:
            UserError: the method does not fit the model.
        """
        ranks = builder.ranks
        sizes = builder.layer_sizes() if costs is None else costs
        self.bounds = stage_bounds(method, builder.layer_kinds(), sizes, ranks.pipeline_size)
        self.before_forward: Callable[[int], None] = lambda micro: None  # seeds dropout
        self.micro, self.device = 0, ranks.device
        shape = {"num_pp": ranks.pipeline_size, "num_dp": ranks.data_size}
        topology: Any = PipeDataParallelTopology(**shape)
        if ranks.tensor_size > 1:
            topology = PipeModelDataParallelTopology(**shape, num_mp=ranks.tensor_size)
        super().__init__(builder.layers(), topology=topology, loss_fn=loss)
        assert self.stage_id == ranks.pipeline, "DeepSpeed orders the ranks differently"
        if self.is_last:
            loss.head = as_linear(self.forward_funcs.pop())

    @property
    def is_first(self) -> bool:
        return self.stage_id == 0

    @property
    def is_last(self) -> bool:
        return self.stage_id == len(self.bounds) - 2

    @property
    def takes_positions(self) -> bool:
        """Whether the stage's input carries position ids: all but a stage of the head alone."""
        return self.bounds[self.stage_id] < self.bounds[-1] - 1

    def forward(self, forward_input: Any) -> Any:
        self.before_forward(self.micro)
        self.micro += 1
        return super().forward(forward_input)

    def _partition_layers(self, method: str = "") -> None:
        """Ours: DeepSpeed's would make every layer on every rank to count parameters, and may leave a stage empty."""
        self.parts = self.bounds
        self._set_bounds(start=self.bounds[self.stage_id], stop=self.bounds[self.stage_id + 1])
