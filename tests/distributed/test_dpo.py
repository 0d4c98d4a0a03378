"""Preference optimisation against TRL's own trainer on the same batches, on every kind of layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.test_sft import MODELS, STEPS, learning_rate, plain_model
from tests.tiny import EOD, VOCAB, plan_of, tiny_json, tiny_recipe, tiny_records, train_on_ranks
from tests.unit.trainer.data.test_samples import raw_records
from zeropipe.data_prep.errors import UserError
from zeropipe.data_prep.store import BEGINS, TRAINED
from zeropipe.launcher.cli import main
from zeropipe.trainer.data.batches import BatchShape, make_batch
from zeropipe.trainer.data.samples import Packs, open_samples, sample_order
from zeropipe.trainer.engine.reference import FILE
from zeropipe.trainer.metrics.reading import read_metrics
from zeropipe.trainer.objectives.registry import objective_of

pytestmark = pytest.mark.distributed
BATCH, SEQ, CLIP = 4, 64, 0.3
REWARDS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tiny_records(tmp_path_factory.mktemp("data") / "store", "dpo")


def recipe_of(store: Path, output: Path, model: str = "llama", **sections: Any) -> dict[str, Any]:
    sections = {"objective": "dpo", "duration": {"steps": STEPS}, "batch": {"global": BATCH}, **sections}
    sections["data"] = {"seq_len": SEQ, "split": "1", "packing": "none", **sections.get("data", {})}
    return tiny_recipe(store, output, model={"config": MODELS[model]}, **sections)


def word(token: int) -> str:
    return "<end>" if token == EOD else f"w{token}"


def pairs_in_order(store: Path) -> list[dict[str, str]]:
    """What a run reads, as text whose words are the tokens."""
    plan = plan_of(recipe_of(store, store / "run"), tiny_json(), 1)
    samples = open_samples(plan.recipe, "train")
    rows, packs, raw = (
        sample_order(plan.recipe, samples).sample(np.arange(STEPS * BATCH))[1],
        samples[0],
        raw_records(store),
    )
    assert isinstance(packs, Packs)
    pairs = []
    for row in rows:
        (record,) = packs.rows[int(row)]
        tokens, flags = raw[record]
        chosen, rejected = np.split(np.arange(len(tokens)), np.flatnonzero(flags & BEGINS)[1:])
        prompt = [place for place in chosen if not flags[place] & TRAINED]
        words = {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}
        pairs.append({key: "".join(" " + word(tokens[place]) for place in places) for key, places in words.items()})
    return pairs


def by_trl(store: Path, folder: Path, model: str, loss: str) -> list[dict[str, float]]:
    """Loss and metrics of each step by TRL's trainer: fp32, one process, its batches of two pairs summed up by it."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    words = Tokenizer(models.WordLevel({word(n): n for n in range(VOCAB)}, unk_token=word(1)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=word(EOD), pad_token=word(EOD))
    net = plain_model(model)
    matrices, vectors = ([p for p in net.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    seen: list[dict[str, float]] = []

    class Keep(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "rewards/chosen" in logs:
                seen.append(dict(logs))

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    config = DPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        max_grad_norm=CLIP,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        disable_dropout=True,
        gradient_checkpointing=False,
        beta=0.1,
        loss_type=[loss],
        max_length=SEQ,
    )
    trainer = InOrder(
        model=net,  # type: ignore[arg-type]
        ref_model=plain_model(model),  # type: ignore[arg-type]
        args=config,
        train_dataset=Dataset.from_list(pairs_in_order(store)),
        processing_class=tokenizer,
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: learning_rate(min(step, STEPS - 1)) / 1e-3)),
        callbacks=[Keep()],
    )
    trainer.train()
    return seen


@pytest.fixture(scope="module")
def trl(store, tmp_path_factory) -> dict[str, list[dict[str, float]]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {loss: by_trl(store, tmp_path_factory.mktemp("trl"), "llama", loss) for loss in ("sigmoid", "ipo")}
    torch.set_num_threads(threads)
    return found


def records_of(output: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(output) if record["kind"] == "train"]


CASES: list[tuple[str, int, int, str, dict[str, Any], dict[str, Any]]] = [
    ("zero0", 1, 4, "sigmoid", {}, {}),
    ("zero1", 2, 1, "sigmoid", {}, {}),
    ("zero3", 2, 2, "ipo", {}, {}),
    ("zero1", 2, 2, "sigmoid", {"parallel": {"pipeline": 2}}, {}),
    ("zero2", 2, 2, "sigmoid", {}, {"sequence_parallel_size": 2}),
    ("zero1", 2, 4, "ipo", {}, {"tensor_parallel": {"autotp_size": 2}}),
]


@pytest.mark.parametrize(("stage", "world", "micro", "loss", "sections", "extra"), CASES)
def test_twenty_steps_are_those_of_trl(stage, world, micro, loss, sections, extra, store, trl, tmp_path):
    recipe = recipe_of(store, tmp_path / "run", objective={"type": "dpo", "loss": loss}, **sections)
    train_on_ranks(world, recipe, tiny_json(stage, micro, **extra))
    steps = records_of(tmp_path / "run")
    assert len(steps) == len(trl[loss]) == STEPS
    if loss == "sigmoid":
        assert abs(steps[0]["loss"] - math.log(2)) < 1e-6
    for ours, theirs in zip(steps, trl[loss], strict=True):
        assert ours["loss"] == pytest.approx(float(theirs["loss"]), rel=1e-4, abs=1e-5)
        for name in REWARDS:
            assert ours[name] == pytest.approx(float(theirs[name]), rel=1e-4, abs=1e-5), name
    assert steps[-1]["rewards/margins"] > 0.01


def test_a_resume_is_the_same_bit_for_bit_and_needs_no_second_pass(store, tmp_path):
    """The log-probabilities before training are the first process's; a resumed one begins from later weights."""
    parts = recipe_of(store, tmp_path / "parts", duration={"steps": 7}, schedule={"type": "constant", "warmup": 0})
    longer = {**parts, "duration": {"steps": STEPS}}
    train_on_ranks(2, {**parts, "save": {"every": 0}}, tiny_json("zero1", 1))
    kept = (tmp_path / "parts" / FILE).read_bytes()
    train_on_ranks(2, longer, tiny_json("zero1", 1))  # reads more pairs: theirs are added
    added = (tmp_path / "parts" / FILE).read_bytes()
    at_once = {**longer, "output": str(tmp_path / "at_once")}
    train_on_ranks(2, at_once, tiny_json("zero1", 1))
    assert added != kept
    columns = ("step", "loss", *REWARDS)
    found, expected = (
        [[record[column] for column in columns] for record in records_of(tmp_path / name)]
        for name in ("parts", "at_once")
    )
    assert found == expected


def test_several_pairs_in_a_row_count_alike(tmp_path):
    """Packed and resumed on another layout; the first loss is ln 2 whatever a row holds. Nothing is evaluated."""
    store = tiny_records(tmp_path / "store", "dpo", longest=12)
    sections = {"data": {"packing": "best_fit", "split": "80,20"}, "save": {"every": 3}, "duration": {"steps": 6}}
    train_on_ranks(2, recipe_of(store, tmp_path / "run", **sections), tiny_json("zero3", 1))
    steps = records_of(tmp_path / "run")
    assert abs(steps[0]["loss"] - math.log(2)) < 1e-6
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000003"
    other = recipe_of(store, tmp_path / "other", **sections, resume=str(checkpoint), parallel={"pipeline": 2})
    train_on_ranks(2, other, tiny_json("zero1", 2))
    again = records_of(tmp_path / "other")
    assert [record["step"] for record in again] == [4, 5, 6]
    for ours, theirs in zip(again, steps[3:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["rewards/margins"] == pytest.approx(theirs["rewards/margins"], rel=1e-3, abs=1e-6)


def test_what_is_trained_on_may_be_evaluated_too(store, tmp_path):
    """The same pairs under two names, of which the evaluation reads a few: all of them keep their reference."""
    sections = {
        "eval": {"every": 3, "batches": 1, "sets": {"again": [{"store": str(store)}]}},
        "duration": {"steps": 3},
    }
    train_on_ranks(2, recipe_of(store, tmp_path / "run", **sections), tiny_json("zero1", 2))
    found = records_of(tmp_path / "run")
    train_on_ranks(2, recipe_of(store, tmp_path / "alone", duration={"steps": 3}), tiny_json("zero1", 2))
    assert [record["loss"] for record in found] == [record["loss"] for record in records_of(tmp_path / "alone")]
    assert all(math.isfinite(record["logps/chosen"]) for record in found)


def test_smoothing_and_no_reference_are_the_papers_formulas(store):
    packs = open_samples(plan_of(recipe_of(store, store / "run"), tiny_json(), 1).recipe, "train")[0]
    smooth, free = (objective_of({"type": "dpo", "beta": 0.5, **options}) for options in SMOOTH_AND_FREE)
    batch = make_batch([(packs, 0), (packs, 1)], BatchShape(2, 1, 2, SEQ, VOCAB, 1, smooth.collate))
    nats = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(0)) * (batch.labels >= 0)
    logps = [-nats[batch.extras["texts"] == text].sum() for text in range(4)]
    margins = [0.5 * (logps[0] - logps[1]), 0.5 * (logps[2] - logps[3])]
    for objective, epsilon in ((smooth, 0.2), (free, 0.0)):
        wanted = sum(
            -(1 - epsilon) * torch.sigmoid(margin).log() - epsilon * torch.sigmoid(-margin).log() for margin in margins
        )
        assert objective.loss(batch, nats).sum.item() == pytest.approx(float(wanted), rel=1e-5)
        assert objective.weight(batch) == 2
    assert free.reference is False and smooth.reference is True


SMOOTH_AND_FREE: tuple[dict[str, Any], ...] = ({"label_smoothing": 0.2}, {"reference_free": True})
WRONG = [
    ({"beta": 0}, "objective.beta 0: must be a number above 0"),
    ({"loss": "hinge"}, "objective.loss 'hinge': there are sigmoid and ipo"),
    ({"label_smoothing": 0.5}, "objective.label_smoothing 0.5: must be from 0 to below 0.5"),
    ({"loss": "ipo", "label_smoothing": 0.1}, "is for loss sigmoid"),
    ({"gamma": 1}, "objective dpo: unknown option 'gamma'"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        objective_of({"type": "dpo", **options})


def test_the_verb_eval_finds_what_the_run_found(store, tmp_path, capsys):
    """A run from a folder; the verb compares with that folder's model, or one that is named, and asks for one."""
    plain_model("llama").save_pretrained(tmp_path / "initial")  # type: ignore[operator]
    held = {"every": 6, "batches": 100, "sets": {"whole": [{"store": str(store)}]}}
    sections = {"eval": held, "duration": {"steps": 6}, "save": {"every": 0}}
    recipe = recipe_of(store, tmp_path / "run", objective={"type": "dpo", "beta": 0.5}, **sections)
    recipe["model"] = {"init": str(tmp_path / "initial")}
    recipe["data"] = {**recipe["data"], "split": "80,20"}
    train_on_ranks(2, recipe, tiny_json("zero2", 2))
    held_out = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "eval"]
    assert [record["split"] for record in held_out] == ["valid", "whole"]
    for record, words in zip(held_out, ([], ["--store", str(store)]), strict=True):
        capsys.readouterr()
        assert main(["eval", str(tmp_path / "run"), *words, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        for name in ("loss", *REWARDS):
            assert found[name] == pytest.approx(record[name], rel=1e-5, abs=1e-6), name
        assert found["loss"] < math.log(2)
    initial = str(tmp_path / "initial")
    assert main(["eval", initial, "--store", str(store), "--seq-len", str(SEQ), "--reference", initial, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert main(["eval", initial, "--store", str(store), "--seq-len", str(SEQ)]) == 2
    assert "preferences are compared with a model: name it with --reference" in capsys.readouterr().err
