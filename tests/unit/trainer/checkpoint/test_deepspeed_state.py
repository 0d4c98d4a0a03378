"""What is small in a checkpoint: step counts, hyperparameters, the loss scaler; on stand-ins for what needs a GPU."""

import json
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from zeropipe.trainer.checkpoint.deepspeed_scalars import read_scalars, write_scalars
from zeropipe.trainer.checkpoint.deepspeed_state import create_state


class CountingAdam(torch.optim.Optimizer):
    """Counts steps as DeepSpeed's FusedAdam does: in an int of the parameter's state, of each group's last one only."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 0})

    def step(self, closure=None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            state["step"] += 1


def _engine(optimizer: torch.optim.Optimizer, **wrapper) -> SimpleNamespace:
    wrapped = SimpleNamespace(optimizer=optimizer, **wrapper) if wrapper else optimizer
    counters = {"global_steps": 5, "global_samples": 40, "skipped_steps": 1}
    return SimpleNamespace(optimizer=wrapped, lr_scheduler=None, **counters)


def _parameters(count: int = 2) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3)) for _ in range(count)]


@pytest.mark.parametrize("make", [CountingAdam, lambda p: torch.optim.AdamW(p, lr=1e-3)], ids=["deepspeed", "torch"])
def test_the_step_comes_back_in_the_optimizers_own_type(make):
    engine = _engine(make(_parameters()))
    create_state(engine, ["exp_avg", "exp_avg_sq"], {"step": 17.0})
    for p, state in engine.optimizer.state.items():
        if make is CountingAdam:
            assert type(state["step"]) is int and state["step"] == 17
        else:
            assert state["step"].dtype == torch.float32 and state["step"].dim() == 0 and float(state["step"]) == 17
        assert state["exp_avg"].shape == p.shape and not state["exp_avg"].requires_grad
    assert read_scalars(engine)["scalars"] == {"step": 17.0}
    assert read_scalars(engine)["kinds"] == ["exp_avg", "exp_avg_sq"]


def test_deepspeeds_count_on_the_last_parameter_of_each_group_is_the_count_of_all():
    first, second = _parameters(2), _parameters(3)
    engine = _engine(CountingAdam([{"params": first}, {"params": second}]))
    for _ in range(4):
        engine.optimizer.step()
    assert [engine.optimizer.state[p]["step"] for p in (*first, *second)] == [0, 4, 0, 0, 4]
    saved = read_scalars(engine)["scalars"]
    assert saved == {"step": 4.0}
    create_state(engine, ["exp_avg", "exp_avg_sq"], saved)
    engine.optimizer.step()
    assert [engine.optimizer.state[p]["step"] for p in (*first, *second)] == [4, 5, 4, 4, 5]
    assert read_scalars(engine)["scalars"] == {"step": 5.0}
    engine.optimizer.state[first[-1]]["step"] = 3
    with pytest.raises(ValueError, match="step"):
        read_scalars(engine)


def test_a_checkpoint_from_before_the_first_step_leaves_the_optimizer_without_state():
    engine = _engine(torch.optim.AdamW(_parameters()))
    saved = read_scalars(engine)
    assert (saved["kinds"], saved["scalars"]) == ([], {})
    for p in engine.optimizer.param_groups[0]["params"]:
        p.grad = torch.ones(3)
    engine.optimizer.step()
    create_state(engine, saved["kinds"], saved["scalars"])
    assert not engine.optimizer.state


def test_parameters_with_different_step_counts_are_refused():
    first, second = _parameters()
    engine = _engine(torch.optim.AdamW([first, second]))
    create_state(engine, ["exp_avg"], {"step": 3.0})
    engine.optimizer.state[second]["step"] += 1
    with pytest.raises(ValueError, match="step"):
        read_scalars(engine)


def _scheduler() -> SimpleNamespace:
    return SimpleNamespace(state_dict=lambda: {"last_batch_iteration": 4}, load_state_dict=lambda state: None)


def _two_groups(lr: float, betas: tuple, decay: float) -> torch.optim.AdamW:
    groups = [{"params": _parameters(1), "weight_decay": decay}, {"params": _parameters(1), "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas)


@pytest.mark.parametrize("scheduled", [True, False])
def test_what_a_schedule_moved_comes_back_and_what_is_configured_stays(scheduled):
    source, target = _engine(_two_groups(0.1 + 0.2, (0.8, 0.95), 0.1)), _engine(_two_groups(1.0, (0.9, 0.99), 0.5))
    target.global_steps = target.global_samples = target.skipped_steps = 0
    if scheduled:
        source.lr_scheduler, target.lr_scheduler = _scheduler(), _scheduler()
    write_scalars(target, json.loads(json.dumps(read_scalars(source))))
    for group, decay in zip(target.optimizer.param_groups, (0.5, 0.0), strict=True):
        assert group["lr"] == 0.1 + 0.2
        assert group["betas"] == ((0.8, 0.95) if scheduled else (0.9, 0.99))
        assert group["weight_decay"] == decay
    assert (target.global_steps, target.global_samples, target.skipped_steps) == (5, 40, 1)


def test_a_pipeline_stage_may_have_fewer_groups_than_the_first():
    saved = read_scalars(_engine(_two_groups(3e-4, (0.9, 0.95), 0.1)))
    stage = _engine(torch.optim.AdamW(_parameters(1), lr=1.0, weight_decay=0.0))
    write_scalars(stage, saved)
    assert [(group["lr"], group["weight_decay"]) for group in stage.optimizer.param_groups] == [(3e-4, 0.0)]


def _scaler() -> DynamicLossScaler:
    return DynamicLossScaler(2**16, 3, 1, 2, False)


def test_the_dynamic_loss_scale_goes_on_where_it_was(monkeypatch):
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)  # it only logs
    source, target = (_engine(torch.optim.AdamW(_parameters()), loss_scaler=_scaler()) for _ in range(2))
    for overflow in (True, True, False, False):
        source.optimizer.loss_scaler.update_scale(overflow)
    write_scalars(target, json.loads(json.dumps(read_scalars(source))))
    scales = []
    for engine in (source, target):
        scaler = engine.optimizer.loss_scaler
        for overflow in (False, False, False, True, False):
            scaler.update_scale(overflow)
            scales.append(scaler.cur_scale)
    assert scales[:5] == scales[5:] and len(set(scales)) > 1
