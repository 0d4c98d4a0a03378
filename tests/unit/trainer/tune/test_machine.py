"""A machine's record follows from what its probes took."""

import pytest

from zeropipe.trainer.tune.machine import LARGE, LITTLE, MESSAGE, SMALL, device_of


def test_rates_come_back_from_the_times_they_make():
    rate, tile, latency, bandwidth = 100e9, 30.0, 1e-3, 2e9
    computed = {
        "float32 flops": 2 * LARGE**3,
        "bfloat16 flops": 2 * LARGE**3,
        "float32 large": 2 * LARGE**3 / rate * (1 + 3 * tile / LARGE),
        "float32 small": 2 * SMALL**3 / rate * (1 + 3 * tile / SMALL),
        "bfloat16 large": 2 * LARGE**3 / rate / 4 * (1 + 3 * tile / LARGE),
        "memory": 8e9,
        "copied": 1e9,
        "copy": 0.1,
        "attended": 1e9,
        "attention": 1e9 / (0.4 * rate),
        "kept": 1e6,
        "elementwise": 7 * 1e6 / 1e10,
        "scored": 1e6,
        "logits": 5 * 1e6 / 1e10,
        "updated": 1e6,
        "update": 40 * 1e6 / 1e10,
        "dispatch": 5e-6,
    }
    # four ranks: a tree of depth two, there and back
    rounds = {size: 2 * (2 * latency + size * 3 / 4 / bandwidth) for size in (0, MESSAGE)}
    linked = {"latency": rounds[0], "seconds": rounds[MESSAGE]}
    device = device_of(computed, linked, ranks=4, crowding=2.0, on_cpu=True)
    assert device.rate("float32") == pytest.approx(rate)
    assert device.rate("bfloat16") == pytest.approx(4 * rate)
    assert device.tile == pytest.approx(tile)
    assert (device.bandwidth, device.memory, device.crowding) == (1e10, 4e9, 2.0)
    assert (device.attention, device.passes, device.logit_passes, device.update_bytes) == pytest.approx((0.4, 7, 5, 40))
    assert device.near.latency == pytest.approx(latency)
    assert device.near.bandwidth == pytest.approx(bandwidth)
    assert LITTLE < MESSAGE / 100
