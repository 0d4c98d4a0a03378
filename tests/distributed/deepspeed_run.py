"""A tiny Hugging Face model on plain DeepSpeed, as people who come from elsewhere have it: none of our engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from zeropipe.trainer.data.batches import BatchShape, BatchStream
from zeropipe.trainer.data.samples import open_samples, sample_order
from zeropipe.trainer.ranks.ranks import init_distributed
from zeropipe.trainer.recipe.recipe import Recipe

SCHEDULER = {
    "type": "WarmupLR",
    "params": {"warmup_num_steps": 20, "warmup_max_lr": 1e-2, "warmup_type": "linear"},
}
KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Setup:
    """How they trained."""

    stage: int
    groups: int = 2  # matrices decay and vectors do not; or one group without decay
    offload: bool = False
    precision: str = "fp32"
    wrapped: bool = False  # in a module of their own, so that names have a prefix
    scheduler: bool = False  # DeepSpeed's
    vocab: int = 500
    sub_group: int = 50_000  # elements: several groups of parameters in stage 3


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Any:
        return self.model(input_ids=ids)


class PlainRun:
    def __init__(self, setup: Setup, recipe: Recipe, model_config: dict, universal: bool = False) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.setup, self.ranks = setup, init_distributed()
        torch.manual_seed(3)
        config = AutoConfig.for_model(**model_config, vocab_size=setup.vocab, use_cache=False)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
        module = Wrapper(model) if setup.wrapped else model
        self.module = module.to(torch.bfloat16 if setup.precision == "bf16" else torch.float32)
        ds = self._config(recipe, universal)
        self.deepspeed: Any = deepspeed.initialize(model=self.module, model_parameters=self._groups(recipe), config=ds)[
            0
        ]
        samples = open_samples(recipe, "train")
        whole = recipe.batch.global_batch or 0
        shape = BatchShape(whole // self.ranks.world, 1, whole, recipe.data.seq_len, setup.vocab)
        self.stream = BatchStream(samples, sample_order(recipe, samples), shape, self.ranks)

    def _groups(self, recipe: Recipe) -> list[dict]:
        parameters = list(self.module.parameters())
        if self.setup.groups == 1:
            return [{"params": parameters, "weight_decay": 0.0}]
        matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]
        return [{"params": vectors, "weight_decay": 0.0}, {"params": matrices}]  # not in our order

    def _config(self, recipe: Recipe, universal: bool) -> dict:
        whole, ours = recipe.batch.global_batch or 0, recipe.optimizer
        adam = {"lr": ours.lr, "betas": list(ours.betas), "eps": ours.eps, "weight_decay": ours.weight_decay}
        zero: dict[str, Any] = {"stage": self.setup.stage, "stage3_param_persistence_threshold": 200}
        zero |= {"sub_group_size": self.setup.sub_group}
        if self.setup.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        return {
            "train_batch_size": whole,
            "train_micro_batch_size_per_gpu": whole // self.ranks.world,
            "gradient_clipping": 0.3,
            "steps_per_print": 2**31,
            "zero_force_ds_cpu_optimizer": False,
            "optimizer": {"type": "AdamW", "params": {**adam, "torch_adam": True}},
            "zero_optimization": zero,
            "checkpoint": {"load_universal": universal},
            **({"scheduler": SCHEDULER} if self.setup.scheduler else {}),
            **({"bf16": {"enabled": True}} if self.setup.precision == "bf16" else {}),
        }

    def step(self) -> float:
        """Loss of one step on the next global batch."""
        (micro,) = self.stream.next_step().micro_batches
        logits = self.deepspeed(micro.input_ids)
        loss = nn.functional.cross_entropy(logits.logits.float().flatten(0, 1), micro.labels.flatten())
        self.deepspeed.backward(loss)
        self.deepspeed.step()
        total = loss.detach().double()
        dist.all_reduce(total) if self.ranks.world > 1 else None
        return float(total) / self.ranks.world

    def held(self) -> dict[str, bytes]:
        """Masters and moments as DeepSpeed's own helpers give them, by kind and Hugging Face name. Collective."""
        zero = self.deepspeed.optimizer
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # it links the moments of the first group only
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
        names = [(name.removeprefix("model.") if self.setup.wrapped else name, p)
                 for name, p in self.module.named_parameters()]  # fmt: skip
        return {f"{kind}/{name}": self._full(p, kind).numpy().tobytes() for name, p in names for kind in KINDS}

    def _full(self, p: Any, kind: str) -> Tensor:
        if self.setup.stage == 0:
            return p.detach() if kind == "master" else self.deepspeed.optimizer.state[p][kind]
        full = safe_get_full_fp32_param(p) if kind == "master" else safe_get_full_optimizer_state(p, kind)
        return full.detach().float()


def train_and_save(setup: Setup, recipe: dict, model_config: dict, folder: str, before: int, after: int) -> dict:
    """Trains, saves with DeepSpeed, trains on: what it held when it saved, and the losses after that."""
    run = PlainRun(setup, Recipe.model_validate(recipe), model_config)
    for _ in range(before):
        run.step()
    run.deepspeed.save_checkpoint(folder)
    return {"held": run.held(), "losses": [run.step() for _ in range(after)]}


def save_untrained(setup: Setup, recipe: dict, model_config: dict, folder: str) -> dict[str, bytes]:
    """Saves with DeepSpeed before the first step: the weights that it held, by name."""
    run = PlainRun(setup, Recipe.model_validate(recipe), model_config)
    run.deepspeed.save_checkpoint(folder)
    return {name: p.detach().numpy().tobytes() for name, p in run.module.named_parameters()}


def load_universal(setup: Setup, recipe: dict, model_config: dict, folder: str, samples: int, steps: int) -> dict:
    """Loads a universal folder with DeepSpeed and trains on from a place in the data."""
    run = PlainRun(setup, Recipe.model_validate(recipe), model_config, universal=True)
    path, _ = run.deepspeed.load_checkpoint(folder)
    assert path is not None
    run.stream.samples_consumed = samples
    return {"held": run.held(), "losses": [run.step() for _ in range(steps)], "steps": run.deepspeed.global_steps}


def to_universal(source: str, target: str) -> None:
    """DeepSpeed's own converter."""
    from argparse import Namespace

    from deepspeed.checkpoint.ds_to_universal import main

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    main(Namespace(input_folder=source, output_folder=target, inject_missing_state=True, **options))
