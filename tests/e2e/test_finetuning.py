"""Fine-tuning a real model on real records: its first loss, LoRA to the exported adapter, preferences, masks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.e2e.real import LONGEST, Material, learnt, prepared_store
from tests.harness import run_ranks
from tests.tiny import plan_of, tiny_json, tiny_recipe, write_pair
from tests.unit.data_prep.records.samples import ids_and_masks, trl_template
from zeropipe.data_prep.store import TokenStore
from zeropipe.trainer.data.samples import Packs, open_samples, sample_order
from zeropipe.trainer.evaluation.harness import read_task
from zeropipe.trainer.export.huggingface import read_probe
from zeropipe.trainer.metrics.reading import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
ROWS = 2  # of a step
ZEROPIPE = str(Path(sys.executable).parent / "zeropipe")


def recipe_of(material: Material, output: Path, kind: str = "sft", **sections: Any) -> dict[str, Any]:
    train, valid = material.stores[f"{kind}-train"], material.stores[f"{kind}-valid"]
    stores = {"train": [{"store": str(train)}], "valid": [{"store": str(valid)}], "seq_len": LONGEST}
    own = {"model": {"init": str(material.model)}, "objective": kind, "batch": {"global": ROWS}}
    recipe = tiny_recipe(train, output, **{**own, **sections})
    return {**recipe, "model": own["model"], "data": stores | sections.get("data", {})}


def plain_model(material: Material) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(material.model, dtype=torch.float32)


def tokenizer_of(material: Material) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(material.model)


def _first_step(recipe: dict[str, Any], ds: dict[str, Any]) -> tuple[list[tuple[int, float]], float, int]:
    """Of this rank's records of step 0, tokens learnt and their nats; loss and tokens of the step."""
    from zeropipe.trainer.engine.build import build_engine
    from zeropipe.trainer.ranks.ranks import init_distributed
    from zeropipe.trainer.run.data import RunData
    from zeropipe.trainer.run.quiet import quiet

    quiet()
    ranks = init_distributed()
    plan = plan_of(recipe, ds, ranks.world)
    engine, records = build_engine(plan, ranks), []
    with RunData.open(plan).stream(ranks) as stream:
        for micro in stream.next_step().micro_batches:
            losses = engine.token_losses(micro)
            assert losses is not None and micro.position_ids is not None
            starts = [*np.flatnonzero(micro.position_ids.flatten() == 0), micro.labels.numel()]
            for first, last in pairwise(starts):
                labels = micro.labels.flatten()[first:last] >= 0
                if labels.any():  # padding begins anew, too
                    records.append((int(labels.sum()), float(losses.flatten()[first:last].double().sum())))
        stream.samples_consumed = 0
        output = engine.train_step(stream, 0)
    return records, output.loss, output.tokens


@pytest.fixture(scope="module")
def by_transformers(material: Material, tmp_path_factory) -> list[tuple[int, float]]:
    """Tokens and nats of every record of the first step, each in a forward pass of its own."""
    plan = plan_of(recipe_of(material, tmp_path_factory.mktemp("none")), tiny_json(), 1)
    (packs,) = samples = open_samples(plan.recipe, "train")
    assert isinstance(packs, Packs)
    rows = sample_order(plan.recipe, samples).sample(np.arange(ROWS))[1]
    dialogues, tokenizer, model = material.dialogues("train"), tokenizer_of(material), plain_model(material)
    found = []
    for record in np.concatenate([packs.rows[int(row)] for row in rows]):
        ids, mask = (torch.tensor(column) for column in learnt(tokenizer, dialogues[record]))
        with torch.no_grad():
            nats = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        found.append((int(mask[1:].sum()), float(nats[mask[1:] > 0].double().sum())))
    return found


@pytest.mark.parametrize(("world", "stage"), [(1, "zero1"), (2, "zero3")])
def test_the_first_loss_is_that_of_transformers(world, stage, material, by_transformers, tmp_path, record_property):
    """Packed several to a row, and every record alone in transformers: the same tokens, each record the same nats."""
    parts = run_ranks(world, _first_step, recipe_of(material, tmp_path / "run"), tiny_json(stage, 1), timeout=600)
    records = [record for rank in parts for record in rank[0]]
    assert [tokens for tokens, _ in records] == [tokens for tokens, _ in by_transformers]
    errors = [abs(a[1] - b[1]) / b[1] for a, b in zip(records, by_transformers, strict=True)]
    tokens, nats = (sum(column) for column in zip(*by_transformers, strict=True))
    loss = parts[0][1]
    record_property("records", len(records))
    record_property("tokens", tokens)
    record_property("worst relative error of a record", max(errors))
    record_property("error of the loss", abs(loss - nats / tokens))
    assert parts[0][2] == tokens and len(records) > 2 * ROWS
    assert max(errors) < 1e-5 and abs(loss - nats / tokens) < 1e-5


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_preferences_begin_at_the_logarithm_of_two(adapter, material, tmp_path, record_property):
    chosen = "none" if adapter == "none" else {"type": adapter, "r": 8, "alpha": 16}
    own = {"adapter": chosen, "duration": {"steps": 1}, "data": {"packing": "none"}}
    recipe = recipe_of(material, tmp_path / "run", "dpo", schedule={"warmup": 0}, **own)
    run_ranks(2, _train_once, recipe, tiny_json("zero2", 1), timeout=600)
    (step,) = (record for record in read_metrics(tmp_path / "run") if record["kind"] == "train")
    record_property("error of the loss", abs(step["loss"] - math.log(2)))
    assert abs(step["loss"] - math.log(2)) < 1e-6 and step["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert step["logps/chosen"] != step["logps/rejected"] and step["grad_norm"] > 0.1


def _train_once(recipe: dict[str, Any], ds: dict[str, Any]) -> int:
    from tests.tiny import _train

    return _train(recipe, ds)


def zeropipe(*words: object) -> str:
    done = subprocess.run([ZEROPIPE, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def by_position(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Largest deviation at each position, over the largest logit."""
    return (logits - expected).abs().amax((0, 2)) / expected.abs().max()


def test_lora_lowers_the_held_out_loss_and_goes_out_as_it_is(material, tmp_path, record_property):
    """Ten steps on two ranks; training's own logits, the merged export's and plain peft's are the same."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run, merged, alone = tmp_path / "run", tmp_path / "merged", tmp_path / "adapter"
    sections = {"adapter": {"type": "lora", "r": 8, "alpha": 16, "targets": "all-linear"}, "duration": {"steps": 10}}
    recipe = recipe_of(material, run, **sections)
    recipe["optimizer"], recipe["schedule"] = {"lr": 2e-3}, {"type": "constant", "warmup": 0}
    pair = write_pair(tmp_path, recipe, {**tiny_json("zero2", 1), "gradient_clipping": 1.0})
    zeropipe("launch", pair[0], "--deepspeed_config", pair[1], "--devices", 2)

    held_out = "--store", material.stores["sft-valid"], "--seq-len", LONGEST, "--batches", 1, "--json"
    before, after = (json.loads(zeropipe("eval", model, *held_out))["loss"] for model in (material.model, run))
    record_property("held-out loss before", before)
    record_property("held-out loss after", after)
    assert after < before - 0.1

    zeropipe("export", run, "--output", merged)
    zeropipe("export", run, "--adapter", "--output", alone)
    (checkpoint,) = run.glob("checkpoints/step-*")
    probe = read_probe(checkpoint)
    assert probe is not None
    base, whole = plain_model(material), AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    on_base = PeftModel.from_pretrained(plain_model(material), str(alone))
    dialogue = torch.tensor([learnt(tokenizer_of(material), material.dialogues("valid")[0])[0]])
    with torch.no_grad():
        untrained, by_peft, by_merged = (model(dialogue).logits for model in (base, on_base, whole))
        live = by_position(on_base(probe[0]).logits, probe[1])
    merging = by_position(by_merged, by_peft)
    record_property("peft against training", float(live.max()))
    record_property("merged against peft", float(merging.max()))
    assert live.max() < 1e-5 and merging.max() < 1e-5
    assert by_position(untrained, by_peft).max() > 1e-2  # without the adapter they are others


QUESTIONS = """\
task: dialogues
dataset_path: json
dataset_kwargs: {data_files: {test: dialogues.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{answers}}"
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: brier_score}]
"""


def test_tasks_of_the_harness_are_the_same_by_its_own_model(material, tmp_path, record_property):
    """Asked while it trains, afterwards, and of the export by lm-evaluation-harness alone, offline."""
    import lm_eval

    pairs = [(own[0]["content"], own[1]["content"]) for own in material.dialogues("valid")][:12]
    lines = [
        {"question": asked, "answers": [pairs[(i + 7 * k) % len(pairs)][1] for k in range(2)], "right": 0}
        for i, (asked, _) in enumerate(pairs)
    ]
    task = tmp_path / "dialogues.yaml"
    task.write_text(QUESTIONS)
    (tmp_path / "dialogues.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = tmp_path / "run"
    eval_ = {"every": 2, "batches": 1, "tasks": [str(task)]}
    recipe = recipe_of(material, run, eval=eval_, duration={"steps": 2}, optimizer={"lr": 1e-4}, save={"every": 2})
    pair = write_pair(tmp_path, recipe, tiny_json("zero1", 1))
    zeropipe("launch", pair[0], "--deepspeed_config", pair[1], "--devices", 2)
    (live,) = (record for record in read_metrics(run) if record["kind"] == "task")
    told = zeropipe("eval", run, "--tasks", task, "--json", "--device", "cpu")
    (after,) = json.loads(told.splitlines()[-1])
    zeropipe("export", run, "--dtype", "float32", "--output", tmp_path / "export")
    theirs = lm_eval.simple_evaluate(
        "hf",
        {"pretrained": str(tmp_path / "export"), "dtype": "float32", "device": "cpu"},
        tasks=[read_task(task, "--tasks")],
        batch_size=8,
        log_samples=False,
    )
    expected = theirs["results"]["dialogues"]
    names = [name for name in after if "," in name]
    assert {"acc,none", "acc_norm,none"} < set(names) and after["samples"] == len(lines)
    for name in names:
        record_property(name, after[name])
        loose = 0.2 if name == "brier_score_stderr,none" else 1e-5  # while training of fewer draws
        assert after[name] == pytest.approx(expected[name], rel=1e-5), name
        assert live[name] == pytest.approx(expected[name], rel=loose), name
    assert 0 < after["brier_score,none"] < 2  # of every probability: no two models have the same by chance


def test_masks_are_those_of_a_template_with_markers(material, tmp_path, record_property):
    """SmolLM2's template has no markers, TRL's ChatML one for training has; they differ in the default system turn."""
    tokenizer, template = tokenizer_of(material), trl_template("qwen2_5_training")
    system = {"role": "system", "content": "You answer shortly."}
    dialogues = [[system, *messages] for split in ("train", "valid") for messages in material.dialogues(split)]
    records = tmp_path / "records.jsonl"
    records.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in dialogues), "utf-8")
    (tmp_path / "chatml.jinja").write_text(template, "utf-8")
    marked = prepared_store(
        "sft", records, material.model, tmp_path / "marked", "--chat-template", str(tmp_path / "chatml.jinja")
    )
    found = prepared_store("sft", records, material.model, tmp_path / "found", "--train-trailing")
    newline = tokenizer.encode("\n", add_special_tokens=False)[0]
    starts = tokenizer.encode("<|im_start|>assistant", add_special_tokens=False)
    by_markers, by_comparison = (ids_and_masks(TokenStore.open(store)) for store in (marked, found))
    answers = 0
    for messages, ((ids, mask),), ((own, own_mask),) in zip(dialogues, by_markers, by_comparison, strict=True):
        theirs = tokenizer.apply_chat_template(
            messages, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
        )
        assert ids == theirs["input_ids"] == own and mask == theirs["assistant_masks"]
        # its markers begin before the line feed that a prompt for an answer ends with: that is given, not learnt
        for place in range(len(starts), len(own)):
            if own[place - len(starts) : place] == starts:
                assert own[place] == newline and theirs["assistant_masks"][place] == 1
                theirs["assistant_masks"][place] = 0
                answers += 1
        assert own_mask == theirs["assistant_masks"]
    record_property("records", len(dialogues))
    record_property("answers", answers)
    assert answers == sum(message["role"] == "assistant" for messages in dialogues for message in messages)
