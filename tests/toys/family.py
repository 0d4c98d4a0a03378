"""A model family of somebody else's: a Llama whose first norm has another name. Importing this file registers it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from zeropipe.trainer.families.llama import LLAMA
from zeropipe.trainer.families.param_spec import ParamSpec
from zeropipe.trainer.families.registry import FAMILIES

NAME = "toyllama"


class ToyConfig(LlamaConfig):
    model_type = NAME


class ToyLayer(LlamaDecoderLayer):
    def __init__(self, config: ToyConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.first_norm = self.input_layernorm
        del self.input_layernorm

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.first_norm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class ToyModel(LlamaModel):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(ToyLayer(config, layer) for layer in range(config.num_hidden_layers))


class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.model = ToyModel(config)


def block(config: Mapping[str, Any]) -> list[ParamSpec]:
    return [replace(spec, name=spec.name.replace("input_layernorm", "first_norm")) for spec in LLAMA.block(config)]


TOY = replace(
    LLAMA,
    block=block,
    feeds={
        "first_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    },
)
FAMILIES.register(NAME, TOY)
AutoConfig.register(NAME, ToyConfig)
AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM)
