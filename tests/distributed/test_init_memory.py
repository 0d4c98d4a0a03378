"""Weights of a folder under ZeRO-3: a rank never holds more than its share of them and one parameter."""

import pytest

from tests.distributed.init_memory import PARAMETER, begun

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SLACK = 12 << 20


def test_what_a_rank_takes_shrinks_as_its_share_does(tmp_path, record_property):
    """Measured: the share and the largest parameter while the model is built; with gradients and masters three shares
    and two parameters."""
    for world in (2, 4):
        most = [max(figures) for figures in zip(*begun(world, tmp_path), strict=True)]
        share, model, engine = most
        record_property(f"{world} ranks, MB", ", ".join(f"{nbytes / 1e6:.0f}" for nbytes in most))
        assert model < share + PARAMETER + SLACK
        assert engine < 3 * share + 2 * PARAMETER + SLACK
