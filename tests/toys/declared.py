"""A family as somebody adds it to transformers: a configuration class that declares its plans, and a model. Nothing in
it knows this product. Its attention has a norm of every head's values, and its logits are capped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaRMSNorm

NAME = "declared_toy"


class DeclaredConfig(LlamaConfig):
    model_type = NAME
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.self_attn.v_norm": "replicated_with_grad_allreduce",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }


class DeclaredAttention(LlamaAttention):
    def __init__(self, config: DeclaredConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.v_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps)
        self.v_proj.register_forward_hook(self._normed)

    def _normed(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return self.v_norm(output.unflatten(-1, (-1, self.head_dim))).flatten(-2)


class DeclaredLayer(LlamaDecoderLayer):
    def __init__(self, config: DeclaredConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = DeclaredAttention(config, layer_idx)


class DeclaredModel(LlamaModel):
    config_class = DeclaredConfig

    def __init__(self, config: DeclaredConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(DeclaredLayer(config, layer) for layer in range(config.num_hidden_layers))


class DeclaredForCausalLM(LlamaForCausalLM):
    config_class = DeclaredConfig

    def __init__(self, config: DeclaredConfig) -> None:
        super().__init__(config)
        self.model = DeclaredModel(config)

    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        output = super().forward(*args, **kwargs)
        output.logits = 20 * torch.tanh(output.logits / 20)
        return output


AutoConfig.register(NAME, DeclaredConfig)
AutoModelForCausalLM.register(DeclaredConfig, DeclaredForCausalLM)
