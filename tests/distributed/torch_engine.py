"""A stand-in for DeepSpeed's engine without ZeRO: torch's AdamW over this rank's slices of known tensors.

It makes tensor-, pipeline- and sequence-parallel layouts, and quick saves to be killed, without a model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zeropipe.trainer.families.specs import ParamSpec, parameter_seed
from zeropipe.trainer.modeling.values import piece_of_rank
from zeropipe.trainer.ranks.ranks import Ranks

KINDS = ("master", "exp_avg", "exp_avg_sq")
GPT2 = {"model_type": "gpt2", "vocab_size": 101, "n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 16}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 101,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def known(spec: ParamSpec, kind: str, version: int = 0) -> Tensor:
    """The full tensor that a parameter or moment is supposed to hold."""
    generator = torch.Generator().manual_seed(parameter_seed(version, f"{kind}/{spec.name}"))
    return torch.randn(spec.shape, generator=generator)


class PlainEngine:
    def __init__(self, ranks: Ranks, table: Sequence[ParamSpec], version: int | None) -> None:
        """`version` of the known tensors, or None: other values and no moments, as before a load."""
        self.ranks = ranks
        self.parameters = [(spec.name, self._parameter(spec, version)) for spec in self._stage(table)]
        self.optimizer = torch.optim.AdamW([p for _, p in self.parameters], lr=0.5 if version is None else 1e-3)
        if version is not None:
            for _, p in self.parameters:
                moments = {kind: self._local(p.spec, kind, version) for kind in KINDS[1:]}
                self.optimizer.state[p] = {"step": torch.tensor(7.0), **moments}
        self.lr_scheduler = None
        self.global_steps = self.global_samples = self.skipped_steps = version or 0

    def _stage(self, table: Sequence[ParamSpec]) -> list[ParamSpec]:
        """This pipeline stage's share of the table; the embedding, tied to the head, on the first and the last."""
        stages, stage = self.ranks.pipeline_size, self.ranks.pipeline
        own = list(table)[len(table) * stage // stages : len(table) * (stage + 1) // stages]
        tied = [table[0]] if 0 < stage == stages - 1 else []
        return sorted(own + tied, key=lambda spec: spec.name)

    def _parameter(self, spec: ParamSpec, version: int | None) -> torch.nn.Parameter:
        values = torch.full(spec.local_shape(self.ranks.tensor, self.ranks.tensor_size), 9.0)
        p = torch.nn.Parameter(values if version is None else self._local(spec, "master", version))
        p.spec = spec  # type: ignore[attr-defined]
        return p

    def _local(self, spec: ParamSpec, kind: str, version: int) -> Tensor:
        return piece_of_rank(known(spec, kind, version), spec, torch.float32, self.ranks)

    def wrong(self, version: int) -> list[str]:
        """Tensors that are not, bit for bit, this rank's slice of the known ones."""
        found = []
        for name, p in self.parameters:
            for kind in KINDS:
                held = p.detach() if kind == "master" else self.optimizer.state[p][kind]
                if not torch.equal(held, self._local(p.spec, kind, version)):
                    found.append(f"{kind}/{name}")
        return found
