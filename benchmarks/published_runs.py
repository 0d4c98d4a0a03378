"""Training runs whose layout and utilisation others have published, as `zeropipe tune` would predict them.

The constants of `tune.hardware` for accelerators were fitted on FITTED alone (MosaicML's sweep of MPT on A100, sharded
as by ZeRO-3); nothing was fitted on ON_H100 and PUBLISHED. Sources:

    MosaicML, llm-foundry, scripts/train/benchmarking/README.md (2023), the tables "H100 80GB BF16" and "A100 80GB"
    Narayanan et al., Megatron-LM, arXiv:2104.04473, table 1. The micro batch is not stated: the fastest of 1, 2, 4 and
        8 is taken. The interleaving is not either: as few stretches a stage as can be, but more than one.
    Korthikanti et al., arXiv:2205.05198, abstract: 530B on 2,240 A100
    BigScience, BLOOM, arXiv:2211.05100, section 3.4, and huggingface.co/blog/bloom-megatron-deepspeed: about 150, at
        best 156 TFLOP/s; four Omni-Path links of 100 Gbit/s for eight GPUs
    Llama 3, arXiv:2407.21783, table 4. Its 126 layers, with a stretch for the embedding and one for the head, are 128
        on 16 stages: eight stretches each. Its context parallelism (16) is counted as sequence parallelism.
    OLMo 2 32B, allenai.org/blog/olmo2-32B (38 % of H100s with 200 Gbit/s each); sharding as in OLMo-core's
        src/scripts/train/OLMo2-32B.py: a micro batch of 1 x 4,096 on 512 GPUs, activations recomputed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zeropipe.trainer.plan.layout import Layout
from zeropipe.trainer.plan.settings import read_settings
from zeropipe.trainer.tune.compute import Training
from zeropipe.trainer.tune.cost import Cost, predict
from zeropipe.trainer.tune.hardware import Device, device_named, with_network

TOLERANCE = 0.15


@dataclass(frozen=True)
class Run:
    name: str
    model: dict[str, Any]
    layout: Layout
    seq_len: int
    global_batch: int
    micro: int | Sequence[int]  # several: the fastest of them that fits
    utilisation: float  # as published
    device: str = "a100-80"
    recomputes: bool = False
    counts_again: bool = False  # whether the published figure counts what is computed again
    traits: dict[str, Any] = field(default_factory=dict)  # of the Training
    gbit: float | None = None  # between nodes, each GPU

    def predict(self) -> tuple[float, Cost, int]:
        """Utilisation as the source counts it, the whole prediction, and the micro batch."""
        sizes = [self.micro] if isinstance(self.micro, int) else self.micro
        share = self.global_batch // self.layout.data
        costs = [(self._cost(size), size) for size in sizes if share % size == 0]
        cost, micro = min(costs, key=lambda pair: pair[0].seconds)
        return cost.utilisation * (4 / 3 if self.counts_again else 1), cost, micro

    def _cost(self, micro: int) -> Cost:
        device: Device = with_network(device_named(self.device), None, self.gbit, None)
        json: dict[str, Any] = {
            "bf16": {"enabled": True},
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": self.global_batch // self.layout.data // micro,
            "zero_optimization": {"stage": self.layout.zero_stage, "overlap_comm": self.layout.pipeline == 1},
        }
        if self.recomputes:
            json["activation_checkpointing"] = {}
        return predict(Training(self.model, self.seq_len, **self.traits), self.layout, read_settings(json), device)


def gpt(layers: int, width: int, heads: int, vocab: int, positions: int = 2048, dropout: float = 0.1) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "vocab_size": vocab,
        "n_positions": positions,
        "activation_function": "gelu",
        "resid_pdrop": dropout,
    }


def llama(layers: int, width: int, inner: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 131072,
    }


# name: layers, width, heads (llm-foundry, scripts/train/yamls/pretrain/mpt-*.yaml)
MPT = {
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "760m": (24, 1536, 12),
    "1b": (24, 2048, 16),
    "3b": (32, 2560, 20),
    "7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "70b": (80, 8192, 64),
}


def _mpt(device: str, name: str, seq_len: int, gpus: int, micro: int, steps: int, recomputes: int, mfu: float) -> Run:
    layers, width, heads = MPT[name]
    return Run(
        f"MPT {name}, {gpus} x {device}, {seq_len} tokens",
        gpt(layers, width, heads, 50368, seq_len, dropout=0.0),
        Layout(gpus, gpus, zero_stage=3),
        seq_len,
        gpus * micro * steps,
        micro,
        mfu / 100,
        device,
        bool(recomputes),
        gbit=200 if device.startswith("a100") else 400,
    )


SWEEP = [
    _mpt("h100", "70b", 2048, 64, 8, 4, 1, 42.57),
    _mpt("h100", "30b", 2048, 16, 10, 3, 1, 43.07),
    _mpt("h100", "30b", 8192, 8, 1, 21, 1, 29.92),
    _mpt("h100", "13b", 2048, 64, 2, 1, 0, 39.86),
    _mpt("h100", "13b", 2048, 8, 2, 1, 0, 39.79),
    _mpt("h100", "13b", 16384, 8, 3, 3, 1, 35.55),
    _mpt("h100", "7b", 2048, 8, 6, 1, 0, 46.44),
    _mpt("h100", "7b", 8192, 8, 8, 2, 1, 37.14),
    _mpt("h100", "3b", 2048, 64, 6, 3, 0, 40.80),
    _mpt("h100", "3b", 8192, 8, 3, 6, 0, 40.31),
    _mpt("h100", "1b", 2048, 8, 14, 1, 0, 41.82),
    _mpt("h100", "760m", 2048, 16, 24, 1, 0, 37.89),
    _mpt("a100-80", "70b", 2048, 64, 8, 4, 1, 53.33),
    _mpt("a100-80", "30b", 2048, 8, 3, 21, 1, 55.30),
    _mpt("a100-80", "13b", 2048, 8, 2, 3, 0, 59.57),
    _mpt("a100-80", "13b", 16384, 8, 3, 3, 1, 54.07),
    _mpt("a100-80", "7b", 2048, 8, 6, 2, 0, 64.23),
    _mpt("a100-80", "7b", 8192, 8, 8, 2, 1, 54.47),
    _mpt("a100-80", "3b", 2048, 8, 10, 2, 0, 62.11),
    _mpt("a100-80", "3b", 8192, 8, 3, 6, 0, 59.34),
    _mpt("a100-80", "1b", 2048, 8, 14, 4, 0, 59.86),
    _mpt("a100-80", "350m", 2048, 8, 32, 2, 0, 51.62),
    _mpt("a100-80", "125m", 2048, 8, 32, 2, 0, 44.45),
]
FITTED = [run for run in SWEEP if run.device == "a100-80"]
ON_H100 = [run for run in SWEEP if run.device == "h100"]


def _megatron(
    size: str, heads: int, width: int, layers: int, tensor: int, pipeline: int, gpus: int, batch: int, teraflops: int
) -> Run:
    each = layers // pipeline
    stretches = next((n for n in range(2, each + 1) if each % n == 0), 1) if pipeline > 1 else 1
    return Run(
        f"Megatron-LM GPT {size}, {gpus} x a100-80",
        gpt(layers, width, heads, 51200),
        Layout(gpus, gpus // tensor // pipeline, tensor, 1, pipeline),
        2048,
        batch,
        (1, 2, 4, 8),
        teraflops / 312,
        recomputes=True,
        counts_again=True,
        traits={"fused": False, "interleave": stretches},
    )


def _llama3(gpus: int, sequence: int, seq_len: int, teraflops: int) -> Run:
    data = gpus // 8 // 16 // sequence
    return Run(
        f"Llama 3 405B, {gpus} x h100, {seq_len} tokens",
        llama(126, 16384, 53248, 128, 8, 128256),
        Layout(gpus, data, 8, sequence, 16, 1),
        seq_len,
        16 * (1 << 20) // seq_len,
        1,
        teraflops / 989,
        "h100",
        traits={"interleave": 8},
    )


_MT_NLG = Run(
    "Megatron-Turing 530B, 2240 x a100-80, all recomputed",
    gpt(105, 20480, 128, 51200),
    Layout(2240, 8, 8, 1, 35),
    2048,
    2240,
    1,
    0.421,
    recomputes=True,
    traits={"fused": False, "interleave": 3},
)
PUBLISHED = [
    _megatron("1.7B", 24, 2304, 24, 1, 1, 32, 512, 137),
    _megatron("3.6B", 32, 3072, 30, 2, 1, 64, 512, 138),
    _megatron("7.5B", 32, 4096, 36, 4, 1, 128, 512, 142),
    _megatron("18.4B", 48, 6144, 40, 8, 1, 256, 1024, 135),
    _megatron("39.1B", 64, 8192, 48, 8, 2, 512, 1536, 138),
    _megatron("76.1B", 80, 10240, 60, 8, 4, 1024, 1792, 140),
    _megatron("145.6B", 96, 12288, 80, 8, 8, 1536, 2304, 148),
    _megatron("310.1B", 128, 16384, 96, 8, 16, 1920, 2160, 155),
    _megatron("529.6B", 128, 20480, 105, 8, 35, 2520, 2520, 163),
    _megatron("1008B", 160, 25600, 128, 8, 64, 3072, 3072, 163),
    _MT_NLG,
    replace(
        _MT_NLG,
        name="Megatron-Turing 530B, 2240 x a100-80, scores recomputed",
        utilisation=0.542,
        recomputes=False,
        traits={"fused": True, "interleave": 3},
    ),
    Run(
        "BLOOM 176B, 384 x a100-80",
        gpt(70, 14336, 112, 250880),
        Layout(384, 8, 4, 1, 12, 1),
        2048,
        2048,
        2,
        150 / 312,
        recomputes=True,
        counts_again=True,
        traits={"fused": False},
        gbit=50,
    ),
    _llama3(8192, 1, 8192, 430),
    _llama3(16384, 1, 8192, 400),
    _llama3(16384, 16, 131072, 380),
    Run(
        "OLMo 2 32B, 512 x h100",
        llama(64, 5120, 27648, 40, 8, 100352),
        Layout(512, 512, zero_stage=3),
        4096,
        2048,
        1,
        0.38,
        "h100",
        True,
        gbit=200,
    ),
]


def table(runs: Sequence[Run]) -> list[str]:
    """Lines of a table, and how many are within the tolerance."""
    lines = [f"{'run':<58} {'micro':>5} {'published':>9} {'predicted':>9} {'off by':>7}  where the time goes"]
    near = 0
    for run in runs:
        found, cost, micro = run.predict()
        off = found / run.utilisation - 1
        near += abs(off) <= TOLERANCE
        parts = ("compute", "recompute", "tensor", "sequence", "pipeline", "data", "update", "host")
        shares = ", ".join(
            f"{name} {getattr(cost, name) / cost.seconds:.0%}"
            for name in parts
            if getattr(cost, name) > 0.005 * cost.seconds
        )
        lines.append(f"{run.name:<58} {micro:>5} {run.utilisation:>9.1%} {found:>9.1%} {off:>+7.0%}  {shares}")
    lines.append(f"{near} of {len(runs)} within {TOLERANCE:.0%}")
    return lines


def lines() -> list[str]:
    return [
        "Published utilisation. Fitted on (A100):",
        *table(FITTED),
        "",
        "The same sweep on H100, not fitted on. Its program of early 2023 had no kernels made for that GPU",
        "(FlashAttention 1; even its successor came to 35 % of an H100, arXiv:2407.08608): a miss of the program.",
        *table(ON_H100),
        "",
        "Never fitted on:",
        *table(PUBLISHED),
    ]
