"""What one rank of `train.py` runs: each peer's own training loop, or a look inside ours. Shared part, no benchmark."""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

VOCAB = 50257


def run(job: dict[str, Any], work: Path) -> None:
    """Trains as the peer that the job names; rank 0 writes what it found to the file in $REPORT."""
    found = PEERS[job["peer"]](job, work)
    if os.environ.get("RANK", "0") == "0":
        Path(os.environ["REPORT"]).write_text(json.dumps(found))


def rows(job: dict[str, Any]) -> Any:
    """Random tokens [steps, accumulation, micro batch, time] of this rank."""
    import torch

    draw = torch.Generator().manual_seed(int(os.environ.get("RANK", "0")))
    return torch.randint(1, VOCAB, (job["steps"], job["accumulation"], job["micro"], job["seq"]), generator=draw)


def hugging_face(job: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**job["model"]))


def trainer(job: dict[str, Any], work: Path) -> list[float]:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ended: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ended.append(time.perf_counter())

    options = TrainingArguments(
        output_dir="trainer",
        use_cpu=not torch.cuda.is_available(),
        bf16=True,
        deepspeed=job["ds"],
        per_device_train_batch_size=job["micro"],
        gradient_accumulation_steps=job["accumulation"],
        max_grad_norm=1.0,
        max_steps=job["steps"],
        logging_steps=1000,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    count = (job["steps"] + 1) * job["accumulation"] * job["micro"] * int(os.environ["WORLD_SIZE"])
    data = [{"input_ids": row, "labels": row} for row in torch.randint(1, VOCAB, (count, job["seq"]))]
    Trainer(hugging_face(job), options, train_dataset=data, callbacks=[Clock()]).train()  # type: ignore[arg-type]
    return ended


def deepspeed_engine(job: dict[str, Any], work: Path) -> list[float]:
    """DeepSpeed's engine with the model's own loss, and nothing else."""
    import deepspeed

    deepspeed.init_distributed()
    optimizer = {"type": "AdamW", "params": {"lr": 3e-4, "torch_adam": True}}
    config = {**job["ds"], "optimizer": optimizer, "zero_force_ds_cpu_optimizer": False}
    model = hugging_face(job).train()
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    ended = []
    for step in rows(job):
        for ids in step.to(engine.device):
            engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
            engine.step()
        ended.append(time.perf_counter())
    return ended


def plain_pytorch(job: dict[str, Any], work: Path) -> list[float]:
    """DistributedDataParallel, bf16 autocast, AdamW on fp32 weights."""
    return _plainly(job, hugging_face(job), lambda model, ids: model(input_ids=ids, labels=ids, use_cache=False).loss)


def litgpt(job: dict[str, Any], work: Path) -> list[float]:
    """litgpt's GPT (no dropout, rotary positions) and its chunked loss in the same plain loop."""
    from litgpt.config import Config  # type: ignore[import-not-found]
    from litgpt.model import GPT  # type: ignore[import-not-found]
    from litgpt.utils import chunked_cross_entropy  # type: ignore[import-not-found]

    model = job["model"]
    config = Config(
        name="peer",
        block_size=job["seq"],
        n_layer=model["n_layer"],
        n_embd=model["n_embd"],
        n_head=model["n_head"],
        padded_vocab_size=VOCAB,
        vocab_size=VOCAB,
        norm_class_name="LayerNorm",
        mlp_class_name="GptNeoxMLP",
        bias=True,
        parallel_residual=False,
        rotary_percentage=1.0,
    )
    gpt = GPT(config)
    gpt.lm_head.weight = gpt.transformer.wte.weight
    return _plainly(job, gpt, lambda model, ids: chunked_cross_entropy(model(ids)[:, :-1], ids[:, 1:]))


def _plainly(job: dict[str, Any], model: Any, loss: Any) -> list[float]:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    model = DistributedDataParallel(model.to(device).train())
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=on_gpu)
    ended = []
    for step in rows(job):
        for number, ids in enumerate(step.to(device)):
            last = number + 1 == len(step)
            with nullcontext() if last else model.no_sync():
                with torch.autocast(device.type, torch.bfloat16):
                    value = loss(model, ids)
                (value / len(step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ended.append(time.perf_counter())
    return ended


def inside(job: dict[str, Any], work: Path) -> dict[str, Any]:
    """Where our step's time goes, its arithmetic, and the peaks of this machine measured beside it."""
    import torch

    from zeropipe.trainer.engine.build import build_engine
    from zeropipe.trainer.metrics.record import RunLog
    from zeropipe.trainer.plan.deepspeed_json import load_pair
    from zeropipe.trainer.plan.plan import make_plan
    from zeropipe.trainer.ranks.ranks import accelerator, join_world
    from zeropipe.trainer.run.data import RunData
    from zeropipe.trainer.run.guard import StopRequest
    from zeropipe.trainer.run.quiet import quiet
    from zeropipe.trainer.run.state import TrainState

    quiet()
    ranks = join_world(timedelta(minutes=10))
    clock = Clock(accelerator().synchronize if ranks.device.type != "cpu" else lambda: None)
    clock.watch_collectives()
    plan = make_plan(*load_pair(job["recipe"], job["json"]), ranks.world)
    ranks = ranks.lay_out(1, 1, 1)
    data, stop = RunData.open(plan), StopRequest(ranks)
    engine = build_engine(plan, ranks)
    for name in ("forward", "backward", "step"):
        setattr(engine.deepspeed, name, clock.timed(name, getattr(engine.deepspeed, name)))
    state, steps = TrainState(plan.total_steps), []
    with RunLog(plan, ranks, stop) as log, data.stream(ranks) as stream:
        log.start("start", 0)
        while not state.done:
            clock.spent.clear()
            started = time.perf_counter()
            output = engine.train_step(stream, state.step)
            state.advance(output)
            before = time.perf_counter()
            log.step(state, output)
            ended = time.perf_counter()
            steps.append({**clock.spent, "data": output.data_seconds, "log": ended - before, "total": ended - started})
    timed = steps[job["untimed"] :]
    split = {key: sum(step.get(key, 0.0) for step in timed) / len(timed) for key in steps[-1]}
    size = sum(p.numel() for name, p in engine.named_parameters() if not name.endswith("wpe.weight"))
    return {
        "split": split,
        "flops": 6 * size + 6 * job["model"]["n_layer"] * job["seq"] * job["model"]["n_embd"],
        "peak": ranks.all_sum([matmul_peak(ranks.device, torch.bfloat16)])[0],
        "bandwidth": all_reduce_bandwidth(ranks),
        "threads": torch.get_num_threads(),
    }


class Clock:
    """Seconds by kind of work; a collective inside another kind counts as communication alone."""

    def __init__(self, synchronise: Any) -> None:
        self.spent: dict[str, float] = {}
        self._synchronise, self._inner = synchronise, 0.0

    def timed(self, name: str, function: Any) -> Any:
        def measured(*arguments: Any, **options: Any) -> Any:
            with self.counting(name):
                return function(*arguments, **options)

        return measured

    @contextmanager
    def counting(self, name: str) -> Any:
        outer, self._inner = self._inner, 0.0
        started = time.perf_counter()
        yield
        self._synchronise()
        seconds = time.perf_counter() - started
        self.spent[name] = self.spent.get(name, 0.0) + seconds - self._inner
        self._inner = outer + seconds

    def watch_collectives(self) -> None:
        import torch.distributed as dist

        for name in (
            "all_reduce",
            "reduce",
            "broadcast",
            "all_gather",
            "all_gather_into_tensor",
            "reduce_scatter_tensor",
        ):
            setattr(dist, name, self.timed("communication", getattr(dist, name)))


def matmul_peak(device: Any, dtype: Any, size: int = 2048) -> float:
    """FLOP/s of the best of ten products of two square matrices, while the other ranks do the same."""
    import torch

    from zeropipe.trainer.ranks.ranks import accelerator

    size = size if device.type == "cpu" else 4 * size
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        one @ other
        accelerator().synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def all_reduce_bandwidth(ranks: Any, elements: int = 1 << 24) -> float:
    """Bytes a second that each rank sends in an all-reduce of 64 MiB: 2 (n - 1) / n times the bytes."""
    import torch
    import torch.distributed as dist

    if ranks.world == 1:
        return 0.0
    values, best = torch.zeros(elements, device=ranks.device), float("inf")
    for _ in range(4):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(values)
        values[0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * (ranks.world - 1) / ranks.world * 4 * elements / best


PEERS = {
    "inside": inside,
    "HF Trainer": trainer,
    "DeepSpeed engine": deepspeed_engine,
    "plain PyTorch": plain_pytorch,
    "litgpt": litgpt,
}
