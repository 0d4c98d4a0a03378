"""Hugging Face's own blocks as the layers of a pipeline.

Position ids travel with the activations; masks and rotary tables are made from them once per stage and micro batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig

from ..data.noise import with_noise
from ..families.registry import FAMILIES
from ..families.specs import ParamSpec, padded_vocab, parameter_table
from ..kernels.dropout import Dropout
from ..kernels.swap import use_kernels
from ..ranks.ranks import Ranks
from .attention import BY_TEXT, text_lengths
from .build import make_parameter
from .cross_entropy import Scoring, head_token_losses
from .partition import stage_bounds
from .penalty import NO_PENALTY, Penalty
from .tensor_parallel import parallelise
from .values import RandomValues, Values, put_off

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
        """Arguments as `build_model`; `checkpointing` recomputes the blocks' activations; `adapt` gets every part."""
        self.adapt, self.convert, self.packs = adapt, convert, packs
        self.family = FAMILIES[config["model_type"]]
        self.specs = {spec.name: spec for spec in parameter_table(config, ranks.tensor_size)}
        self.values, self.dtype, self.ranks = values or put_off(RandomValues(seed)), dtype, ranks
        self.vocab_size, self.checkpointing = config["vocab_size"], checkpointing
        trained = {**config, "vocab_size": padded_vocab(config["vocab_size"], ranks.tensor_size)}
        self.config: Any = AutoConfig.for_model(**trained, use_cache=False)
        self.config._attn_implementation = BY_TEXT  # None or "eager" would not be causal in a bare block
        self.tied = bool(self.config.tie_word_embeddings)
        self._rotary: Any = None
        self._memo: tuple[Tensor, int, dict[str, Any]] | None = None

    def make(self, name: str, construct: Callable[[], nn.Module]) -> nn.Module:
        """A part of the model, called `name` by Hugging Face, with its values and its share of the tensor ranks."""
        with torch.device("meta"):
            holder = nn.Sequential(construct())  # so that the part itself can be replaced
        use_kernels(holder)
        for path, module in list(holder[0].named_modules()):
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    spec = self.specs[".".join(filter(None, (name, path, key)))]
                    made = make_parameter(spec, self.values, self.dtype, self.ranks, self.packs(spec))
                    module._parameters[key] = made
            if (converted := self.convert(module)) is not module:
                holder[0].set_submodule(path, converted)
        parallelise(holder, self.family, self.ranks)
        self.adapt(holder[0])
        return holder[0]

    def attention_inputs(self, hidden: Tensor, positions: Tensor) -> dict[str, Any]:
        """Mask and rotary tables of a micro batch; made anew only when the positions are others."""
        if self._memo is None or self._memo[0] is not positions or self._memo[1] != positions._version:
            self._memo = positions, positions._version, self._attention_inputs(hidden, positions)
        return self._memo[2]

    def _attention_inputs(self, hidden: Tensor, positions: Tensor) -> dict[str, Any]:
        mask = text_lengths(positions)
        if self.family.rotary_class is None:
            return {"attention_mask": mask}
        if self._rotary is None:  # kept out of the model: DeepSpeed would cast its frequencies to bfloat16
            self._rotary = resolve_name(self.family.rotary_class)(self.config).to(hidden.device)
        return {"attention_mask": mask, "position_embeddings": self._rotary(hidden, position_ids=positions)}

    def layers(self) -> list[LayerSpec]:
        """The whole model as layers, none of them made yet."""
        embedding = functools.partial(TiedLayerSpec, "embedding", Embedding, self, tied_weight_attr="table.weight")
        first = [embedding() if self.tied else LayerSpec(Embedding, self)]
        if self.family.positions is not None:
            first.append(LayerSpec(Positions, self))
        blocks = [LayerSpec(Block, self, layer) for layer in range(self.config.num_hidden_layers)]
        head = embedding(forward_fn=_tied_head) if self.tied else LayerSpec(Head, self)
        return [*first, *blocks, LayerSpec(Norm, self), head]

    def layer_names(self) -> list[str]:
        """Hugging Face's name of every layer's part."""
        family = self.family
        first = [family.embedding, *([family.positions] if family.positions is not None else [])]
        blocks = [f"{family.blocks}.{layer}" for layer in range(self.config.num_hidden_layers)]
        return [*first, *blocks, family.norm, family.embedding if self.tied else "lm_head"]

    def layer_kinds(self) -> list[str]:
        """What every layer is. A tied head is an embedding to DeepSpeed, and a head to us."""
        return [*(spec.typename.__name__ for spec in self.layers()[:-1]), "Head"]

    def layer_sizes(self) -> list[int]:
        """Parameters of every layer."""
        names = self.layer_names()
        return [sum(spec.numel for spec in self.specs.values() if spec.name.startswith(name + ".")) for name in names]


class Embedding(nn.Module):
    def __init__(self, builder: Builder) -> None:
        super().__init__()
        config, family = builder.config, builder.family
        padding = config.pad_token_id if family.freezes_padding else None
        make = functools.partial(nn.Embedding, config.vocab_size, config.hidden_size, padding)
        self.table = builder.make(family.embedding, make)

    def forward(self, inputs: tuple[Tensor, ...]) -> Carried:
        ids, positions, *noise = inputs  # noise in training alone, if at all
        hidden = self.table(ids)
        return (with_noise(hidden, *noise) if noise else hidden), positions


class Positions(nn.Module):
    def __init__(self, builder: Builder) -> None:
        super().__init__()
        config, family = builder.config, builder.family
        make = functools.partial(nn.Embedding, config.max_position_embeddings, config.hidden_size)
        assert family.positions is not None
        self.table = builder.make(family.positions, make)
        self.drop = Dropout(getattr(config, family.dropout["embedding"]) if "embedding" in family.dropout else 0.0)

    def forward(self, inputs: Carried) -> Carried:
        hidden, positions = inputs
        return self.drop(hidden + self.table(positions)), positions


class Block(nn.Module):
    def __init__(self, builder: Builder, layer: int) -> None:
        super().__init__()
        family = builder.family
        make = functools.partial(resolve_name(family.block_class), builder.config, layer)
        self.block: Any = builder.make(f"{family.blocks}.{layer}", make)
        self.attention_inputs = builder.attention_inputs
        if builder.checkpointing:
            self.block.gradient_checkpointing = True
            self.block._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)

    def forward(self, inputs: Carried) -> Carried:
        hidden, positions = inputs
        return self.block(hidden, position_ids=positions, **self.attention_inputs(hidden, positions)), positions


class Norm(nn.Module):
    def __init__(self, builder: Builder) -> None:
        super().__init__()
        config, family = builder.config, builder.family
        make = functools.partial(
            resolve_name(family.norm_class), config.hidden_size, eps=getattr(config, family.epsilon)
        )
        self.norm = builder.make(family.norm, make)

    def forward(self, inputs: Carried) -> Tensor:
        return self.norm(inputs[0])


class Head(nn.Module):
    def __init__(self, builder: Builder) -> None:
        super().__init__()
        config = builder.config
        self.linear = builder.make("lm_head", lambda: nn.Linear(config.hidden_size, config.vocab_size, bias=False))

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
            return self.head(hidden)

    def token_losses(self, hidden: Tensor, labels: Tensor, penalty: Penalty = NO_PENALTY) -> Tensor:
        """Nats of every label [batch, time]."""
        assert self.head is not None
        builder = self.builder
        scoring = Scoring(builder.vocab_size, builder.config.vocab_size, builder.ranks, penalty)
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
        self.micro = 0
        self.device = ranks.device
        shape = {"num_pp": ranks.pipeline_size, "num_dp": ranks.data_size}
        if ranks.tensor_size > 1:
            topology: Any = PipeModelDataParallelTopology(**shape, num_mp=ranks.tensor_size)
        else:
            topology = PipeDataParallelTopology(**shape)
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
