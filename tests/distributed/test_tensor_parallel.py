"""Tensor parallelism by the table, in plain torch, against one process of Hugging Face."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.distributed import reference
from tests.distributed.reference import Curve, assert_same, gpt2, llama, micro_batch
from tests.harness import RankFailed, run_ranks
from zeropipe.trainer.families.registry import family_of
from zeropipe.trainer.families.specs import parameter_table
from zeropipe.trainer.modeling.build import build_model
from zeropipe.trainer.modeling.cross_entropy import Scoring, token_losses
from zeropipe.trainer.modeling.split_randomness import SplitRandomness
from zeropipe.trainer.modeling.tensor_parallel import RowParallelLinear, parallelise
from zeropipe.trainer.modeling.values import merge_slices, piece_of_rank
from zeropipe.trainer.ranks.ranks import Ranks, init_distributed

pytestmark = pytest.mark.distributed

STEPS = 4


def _model(config: dict, ranks: Ranks):
    model = build_model(config, reference.values, 0, torch.float32, ranks)
    parallelise(model, family_of(config), ranks)
    return model.train()


def gathered(parameters, ranks: Ranks) -> dict[str, np.ndarray]:
    """Whole weights by Hugging Face's names; fails unless replicated ones are equal on every tensor rank."""
    weights = {}
    for parameter in parameters:
        piece = parameter.detach().float().contiguous()
        pieces = [torch.empty_like(piece) for _ in range(ranks.tensor_size)]
        dist.all_gather(pieces, piece, group=ranks.tensor_group)
        spec = parameter.spec
        if spec.dim is None:
            assert all(torch.equal(piece, other) for other in pieces), f"{spec.name} drifted apart"
        whole = merge_slices(pieces, spec)
        if spec.padded_rows:
            padding = torch.cat(pieces)[spec.shape[0] :]
            assert not padding.any(), f"the padding of {spec.name} was trained"
        weights[spec.name] = whole.numpy().copy()
    return weights


def _clip(parameters, ranks: Ranks) -> float:
    squares = torch.zeros(())
    for parameter in parameters:
        if getattr(parameter, "model_parallel", False) or ranks.tensor == 0:
            squares += parameter.grad.float().norm() ** 2
    dist.all_reduce(squares, group=ranks.tensor_group)
    norm = float(squares.sqrt())
    for parameter in parameters:
        parameter.grad.mul_(min(1.0, reference.CLIP / (norm + 1e-6)))
    return norm


def _train(config: dict, tensor: int, seed: int | None = None, checkpointing: bool = False, defect: str = "") -> Curve:
    ranks = init_distributed(tensor=tensor)
    model, curve = _model(config, ranks), Curve()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = list(model.parameters())
    if defect == "unmarked":
        for parameter in parameters:
            parameter.model_parallel = False
    groups = [{"params": [p], "weight_decay": reference.DECAY if p.spec.decays else 0.0} for p in parameters]
    optimizer = torch.optim.AdamW(groups, lr=reference.LR, betas=reference.BETAS)
    for step in range(STEPS):
        if seed is not None:
            torch.manual_seed(seed + step)
        ids, labels, positions = micro_batch(config, step, 0, 1, 0, 1)
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        vocab = 1 << 20 if defect == "padding predicted" else config["vocab_size"]
        loss = token_losses(logits, labels, Scoring(vocab, vocab, ranks)).sum() / (labels != -100).sum()
        loss.backward()
        curve.norms.append(_clip(parameters, ranks))
        optimizer.step()
        optimizer.zero_grad()
        curve.losses.append(loss.item())
    curve.weights = gathered(parameters, ranks)
    return curve


CASES = {
    "gpt2-tp2": (gpt2(), 2),
    "gpt2-untied-tp2": (gpt2(tie_word_embeddings=False), 2),
    "llama-tp2": (llama(), 2),
    "llama-tied-biased-tp2": (llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True), 2),
    "llama-one-kv-head-tp2": (llama(num_key_value_heads=1), 2),
    "llama-fewer-kv-heads-than-ranks-tp4": (llama(), 4),
    # 100 ids in 512 padded rows: three of the ranks hold nothing but padding
    "gpt2-ranks-of-padding-tp4": (gpt2(vocab_size=100), 4),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name):
    config, tensor = CASES[name]
    truth = reference.truth(config, STEPS)
    for curve in run_ranks(tensor, _train, config, tensor):
        assert_same(curve, truth)


def test_replicated_dropout_is_that_of_one_process():
    """Embedding and residual dropout draw the same masks on every rank, and the same as without any split."""
    config = gpt2(embd_pdrop=0.1, resid_pdrop=0.2)
    truth = reference.truth(config, STEPS, 77)
    for curve in run_ranks(2, _train, config, 2, 77):
        assert_same(curve, truth)


def test_activation_checkpointing_draws_the_same_masks_again():
    config = gpt2(embd_pdrop=0.1, attn_pdrop=0.3, resid_pdrop=0.2)
    once, again = (run_ranks(2, _train, config, 2, 77, checkpointing) for checkpointing in (False, True))
    assert once[0].losses == again[0].losses == again[1].losses
    assert once[0].norms == again[0].norms


def test_parameters_not_marked_as_split_show_in_the_norm():
    truth = reference.truth(gpt2(), STEPS)
    curve, _ = run_ranks(2, _train, gpt2(), 2, None, False, "unmarked")
    with pytest.raises(AssertionError, match="step 0: gradient norm"):
        assert_same(curve, truth)


def test_predicting_the_padding_shows_in_its_rows():
    with pytest.raises(RankFailed, match=r"the padding of transformer.wte.weight was trained"):
        run_ranks(2, _train, gpt2(), 2, None, False, "padding predicted")


def _attention_outputs(config: dict, training: bool, planted: bool) -> tuple[np.ndarray, np.ndarray]:
    """What goes into the first row-parallel linear when every rank's heads are the same, and the generator after it."""
    if planted:
        SplitRandomness.enter = lambda self: None
    ranks = init_distributed(tensor=2)
    model = _model(config, ranks).train(training)
    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), 0)
    seen = []
    row = next(module for module in model.modules() if isinstance(module, RowParallelLinear))
    row.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach().numpy().copy()))
    torch.manual_seed(5)
    model(input_ids=micro_batch(config, 0, 0, 1, 0, 1)[0])
    return seen[0], torch.get_rng_state().numpy().copy()


@pytest.mark.parametrize("config", [gpt2(attn_pdrop=0.5), llama(attention_dropout=0.5)], ids=["gpt2", "llama"])
def test_heads_on_different_ranks_drop_different_probabilities(config):
    (one, state), (two, other_state) = run_ranks(2, _attention_outputs, config, True, False)
    assert not np.allclose(one, two)
    assert np.array_equal(state, other_state), "replicated activations would drop different elements from here on"
    (one, _), (two, _) = run_ranks(2, _attention_outputs, config, False, False)
    assert np.array_equal(one, two), "without dropout the heads are the same, so only the masks can differ"
    (one, _), (two, _) = run_ranks(2, _attention_outputs, config, True, True)
    assert np.array_equal(one, two), "the planted defect, one mask for all ranks, must show"


def test_slices_put_together_are_the_whole():
    for config in (gpt2(tie_word_embeddings=False), llama(num_key_value_heads=1, attention_bias=True)):
        for size in (1, 2, 4):
            for spec in parameter_table(config, size):
                whole = reference.values(spec)
                pieces = [
                    piece_of_rank(whole, spec, whole.dtype, Ranks(tensor=n, tensor_size=size)) for n in range(size)
                ]
                assert [tuple(piece.shape) for piece in pieces] == [
                    spec.local_shape(rank, size) for rank in range(size)
                ]
                assert torch.equal(merge_slices(pieces, spec), whole), spec.name
