"""Predictions against arithmetic done by hand: FLOPs, rooflines, collectives, bubbles."""

from dataclasses import replace

import pytest

from tests.tiny import NO_DROPOUT
from zeropipe.trainer.families.specs import parameter_table
from zeropipe.trainer.plan.layout import Layout
from zeropipe.trainer.plan.settings import read_settings
from zeropipe.trainer.plan.work import model_flops, products_of
from zeropipe.trainer.tune.compute import Training
from zeropipe.trainer.tune.cost import predict
from zeropipe.trainer.tune.hardware import Device, Link, device_named
from zeropipe.trainer.tune.links import Links

INFINITE = float("inf")
FREE = Link(INFINITE, 0.0)
# computes 1 TFLOP/s and does everything else in no time
IDEAL = Device(
    "ideal",
    1e15,
    {"bfloat16": 1e12, "float32": 1e12},
    INFINITE,
    FREE,
    FREE,
    FREE,
    reach=1.0,
    tile=0.0,
    attention=1.0,
    dispatch=0.0,
)
GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, **NO_DROPOUT}
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


def step(layout, device=IDEAL, model=GPT2, micro=1, steps=8, seq_len=1024, **json):
    ds = {
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
        "zero_optimization": {"stage": layout.zero_stage, **json.pop("zero", {})},
        **json,
    }
    return predict(Training(model, seq_len), layout, read_settings(ds), device)


def test_flops_are_six_for_each_weight_and_twelve_for_attention():
    weights = 12 * 12 * 768**2 + 50304 * 768  # of GPT-2 124M; the head's rows padded to a multiple of 128
    assert model_flops(GPT2, 1024) == 6 * weights + 12 * 12 * 768 * 1024
    # Llama 3 8B: keys and values of 8 heads of 128, a gated MLP
    block = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336
    assert model_flops(LLAMA, 8192) == 6 * (32 * block + 128256 * 4096) + 12 * 32 * 4096 * 8192


@pytest.mark.parametrize("model", [GPT2, LLAMA])
@pytest.mark.parametrize("tensor", [2, 4])
def test_tensor_ranks_share_the_products(model, tensor):
    whole, part = (sum(p.flops for p in products_of(parameter_table(model, size), size)) for size in (1, tensor))
    assert part * tensor == whole


def test_a_step_of_nothing_but_products_takes_their_flops():
    cost = step(Layout(1, 1, zero_stage=1))
    weights, tokens = 12 * 12 * 768**2 + 50304 * 768, 8 * 1024
    # attention half as much for being causal, its backward pass 2.5 times the forward one
    attention = 12 * 4 * 768 * 1024 / 2 * (1 + 2.5)
    assert cost.seconds == pytest.approx(tokens * (6 * weights + attention) / 1e12)
    again = step(Layout(1, 1, zero_stage=1), activation_checkpointing={})
    assert again.seconds - cost.seconds == pytest.approx(tokens * 12 * (2 * 12 * 768**2 + 4 * 768 * 1024 / 2) / 1e12)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_equal_stages_wait_for_filling_and_draining(stages):
    model = {**GPT2, "vocab_size": 1}
    one, many = (step(Layout(size, 1, 1, 1, size, 1), model=model) for size in (1, stages))
    assert many.seconds / one.seconds == pytest.approx((8 + stages - 1) / 8 / stages, rel=0.01)


def test_stages_that_share_a_core_are_bound_by_all_work_together():
    four = Layout(4, 1, 1, 1, 4, 1)
    crowded = step(four, replace(IDEAL, crowding=4.0), {**GPT2, "vocab_size": 1})
    assert crowded.seconds == pytest.approx(step(Layout(1, 1, zero_stage=1), model={**GPT2, "vocab_size": 1}).seconds)


def test_collectives_by_hand():
    device = replace(IDEAL, near=Link(100.0, 1.0), far=Link(10.0, 2.0), per_node=8)
    assert Links(device, 8, 1).reduce(800.0) == 2 * (3 * 1.0 + 800 * 7 / 8 / 100)
    assert Links(device, 8, 1).gather(800.0, 2) == 2 * 3 * 1.0 + 800 * 7 / 8 / 100
    # sixteen on two nodes have eight ports each way; one of each node has one
    assert Links(device, 16, 1).bandwidth == 80.0
    assert Links(device, 2, 8).gather(800.0) == 2.0 + 400 / 10
    assert Links(device, 2, 8).send(800.0) == 2.0 + 800 / 10
    assert Links(device, 1, 1).reduce(800.0) == 0.0


def test_gradients_of_each_stage_of_zero_by_hand():
    device, elements = replace(IDEAL, near=Link(1e9, 0.0)), sum(spec.numel for spec in parameter_table(GPT2))
    reduced, gathered = 2 * elements * 2 / 2 / 1e9, elements * 2 / 2 / 1e9  # of two ranks in two bytes
    waits = [step(Layout(2, 2, zero_stage=stage), device).data for stage in range(3)]
    assert waits == pytest.approx([reduced, reduced + gathered, 8 * reduced + gathered])
    third = step(
        Layout(2, 2, zero_stage=3), replace(device, queued=False), zero={"stage3_param_persistence_threshold": 0}
    )
    assert third.data == pytest.approx(8 * (gathered + gathered))
    kept = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    third = step(Layout(2, 2, zero_stage=3), replace(device, queued=False), zero=kept)
    assert third.data == pytest.approx(8 * (2 * gathered + gathered))
    hidden = step(Layout(2, 2, zero_stage=1), device, zero={"overlap_comm": True}).data
    assert gathered < hidden < reduced + gathered


def test_tensor_parallel_sums_four_activations_a_block_and_both_ends():
    device = replace(IDEAL, near=Link(1e9, 0.0))
    one = 2 * 1024 * 768 * 2 / 2 / 1e9
    assert step(Layout(2, 1, 2), device).tensor == pytest.approx(8 * one * (4 * 12 + 2))
    assert step(Layout(2, 1, 2), device, activation_checkpointing={}).tensor == pytest.approx(8 * one * (6 * 12 + 2))


@pytest.mark.parametrize("layout", [Layout(16, 16, zero_stage=3), Layout(16, 2, 4, 1, 2), Layout(16, 4, 1, 4, 1, 2)])
def test_a_slower_machine_is_not_faster(layout):
    device = device_named("h100")
    whole = step(layout, device, LLAMA, steps=4).seconds
    slower = [
        replace(device, far=Link(device.far.bandwidth / 20, device.far.latency)),
        replace(device, near=Link(device.near.bandwidth / 20, device.near.latency)),
        replace(device, bandwidth=device.bandwidth / 2),
        replace(device, peak={key: value / 2 for key, value in device.peak.items()}),
    ]
    found = [step(layout, one, LLAMA, steps=4).seconds for one in slower]
    assert min(found) >= whole
    assert found[2] > whole
    assert found[3] > whole


def test_offload_takes_the_way_to_the_host():
    device = device_named("a100-80")
    on, off = Layout(8, 8, zero_stage=2, offload_optimizer=True), Layout(8, 8, zero_stage=2)
    assert step(on, device, LLAMA).update > 10 * step(off, device, LLAMA).update
