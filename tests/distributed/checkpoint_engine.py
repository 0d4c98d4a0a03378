"""Tiny DeepSpeed engines of every layout for the checkpoint tests, and what they hold according to DeepSpeed itself."""

import hashlib
import math
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from zeropipe.trainer.modeling.build import build_model
from zeropipe.trainer.ranks.ranks import init_distributed

VOCAB = 101  # padded to 128
BATCH, ACCUMULATION, TIME = 8, 2, 16
CONFIGS = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_layer": 2,
        "n_embd": 64,
        "n_head": 4,
        "n_positions": 32,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "llama": {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    },
}


@dataclass(frozen=True)
class EngineCase:
    zero: int
    world: int
    offload: bool = False  # optimizer, and parameters too under stage 3
    precision: str = "fp32"
    family: str = "gpt2"
    optimizer: str = "torch"  # or "deepspeed": FusedAdam, CPUAdam
    scheduler: bool = False
    frozen: bool = False  # position embedding, or the first norm

    def __str__(self) -> str:
        extras = ["offload"] * self.offload + [self.precision, self.family]
        return f"zero{self.zero}-{'-'.join(extras)}-{self.world}"


def ds_config(layout: EngineCase) -> dict:
    adam = {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}
    zero: dict = {"stage": layout.zero, "stage3_param_persistence_threshold": 200}  # some persist, some do not
    if layout.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if layout.zero == 3:
            zero["offload_param"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": BATCH // ACCUMULATION // layout.world,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.3,
        "steps_per_print": 2**31,
        "optimizer": {"type": "AdamW", "params": adam | ({"torch_adam": True} if layout.optimizer == "torch" else {})},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
    }
    if layout.scheduler:
        params = {"warmup_num_steps": 20, "warmup_max_lr": 1e-2, "warmup_type": "linear"}
        config["scheduler"] = {"type": "WarmupLR", "params": params}
    if layout.precision == "bf16":
        config["bf16"] = {"enabled": True}
    return config


class TinyEngine:
    """A DeepSpeed engine over a tiny Hugging Face model, trained on batches that follow from the step's number."""

    def __init__(self, layout: EngineCase, seed: int = 7, vocab: int = VOCAB) -> None:
        self.layout, self.ranks = layout, init_distributed()
        config = ds_config(layout)
        model_config = CONFIGS[layout.family] | {"vocab_size": vocab}
        dtype = torch.bfloat16 if layout.precision == "bf16" else torch.float32
        zero3 = config if layout.zero == 3 else None
        model = build_model(model_config, None, seed, dtype, self.ranks, zero3).train()
        if layout.frozen:
            frozen = model.transformer.wpe if layout.family == "gpt2" else model.model.layers[0].input_layernorm
            frozen.weight.requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.spec.decays]},
            {"params": [p for p in trained if not p.spec.decays], "weight_decay": 0.0},
        ]
        self.deepspeed = deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]
        self.parameters = sorted((p.spec.name, p) for p in model.parameters())
        self.norms: list[float] = []

    def step(self, number: int) -> str:
        """Loss of one optimizer step on the global batch, as `float.hex`."""
        generator = torch.Generator().manual_seed(1000 + number)
        ids = torch.randint(0, VOCAB, (BATCH, TIME + 1), generator=generator)
        ids[:, 1:] = torch.where(
            torch.rand(BATCH, TIME, generator=generator) < 0.7, (ids[:, :-1] * 7 + 3) % VOCAB, ids[:, 1:]
        )
        size = BATCH // ACCUMULATION // self.ranks.world
        total = torch.zeros((), dtype=torch.float64)
        for micro in range(ACCUMULATION):
            first = (micro * self.ranks.world + self.ranks.rank) * size
            x = ids[first : first + size]
            logits = self.deepspeed(input_ids=x[:, :-1]).logits[..., :VOCAB].float()
            loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), x[:, 1:].reshape(-1))
            self.deepspeed.backward(loss)
            self.deepspeed.step()
            total += loss.detach().double() / ACCUMULATION
        if self.layout.zero or self.layout.precision != "fp32":
            self.norms.append(float(self.deepspeed.get_global_grad_norm()))
        if self.ranks.world > 1:
            dist.all_reduce(total)
        return float(total / self.ranks.world).hex()

    def held(self) -> dict[str, str]:
        """SHA-256 of every full fp32 master and moment (unpadded), and of the model's own copy: DeepSpeed's account.

        Padding must be zero. Collective.
        """
        self._relink()
        digests = {}
        for name, p in self.parameters:
            for kind in ("master", "exp_avg", "exp_avg_sq") if p.requires_grad else ("master",):
                digests[f"{kind}/{name}"] = unpadded_digest(self._full(p, kind), p.spec.shape)
            with deepspeed.zero.GatheredParameters([p]):  # nothing outside stage 3
                copy = p.detach().float().view(p.spec.padded_shape).clone()
            digests[f"model/{name}"] = unpadded_digest(copy, p.spec.shape)
        return digests

    def _full(self, p: torch.nn.Parameter, kind: str) -> Tensor:
        if not p.requires_grad:
            with deepspeed.zero.GatheredParameters([p]):
                return p.detach().float().view(p.spec.padded_shape).clone()
        if not hasattr(p, "ds_id") and not hasattr(p, "_hp_mapping"):
            optimizer = self.deepspeed.optimizer
            if hasattr(optimizer, "fp32_groups"):  # the fp16 wrapper: one master per parameter
                groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
                masters = {own: master for group in groups for own, master in zip(*group, strict=True)}
                optimizer, p = optimizer.optimizer, masters[p]
            return p.detach() if kind == "master" else optimizer.state[p][kind]
        full = safe_get_full_fp32_param(p) if kind == "master" else safe_get_full_optimizer_state(p, kind)
        return full.view(p.spec.padded_shape)

    def _relink(self) -> None:
        """DeepSpeed links the moments after the first group's first step: later groups stay without."""
        zero = self.deepspeed.optimizer
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()


def unpadded_digest(tensor: Tensor, shape: tuple[int, ...]) -> str:
    """SHA-256 of the unpadded part of a tensor whose padding is zero."""
    inner = tensor[tuple(slice(0, n) for n in shape)].contiguous()
    assert tensor.count_nonzero() == inner.count_nonzero(), "padding is not zero"
    return hashlib.sha256(inner.float().numpy().tobytes()).hexdigest()


def close(found: list[str], expected: list[str], bound: float) -> bool:
    pairs = [(float.fromhex(a), float.fromhex(b)) for a, b in zip(found, expected, strict=True)]
    return all(math.isfinite(a) and abs(a - b) <= bound * abs(b) for a, b in pairs)
