"""`zeropipe eval --tasks` against lm-evaluation-harness's own model of the exported folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM

from tests.tiny import tiny_json, train_on_ranks
from tests.unit.trainer.runs import CONFIGS, run_recipe
from zeropipe.data_prep.errors import UserError
from zeropipe.launcher.cli import main
from zeropipe.trainer.evaluation.harness import ask_tasks, load_tasks
from zeropipe.trainer.evaluation.task_rounds import DRAWS
from zeropipe.trainer.export.huggingface import export
from zeropipe.trainer.export.load import load_model
from zeropipe.trainer.export.provenance import read_provenance
from zeropipe.trainer.metrics.reading import read_metrics
from zeropipe.trainer.page.collect import collect
from zeropipe.trainer.plan.plan import make_plan
from zeropipe.trainer.recipe.recipe import Recipe
from zeropipe.trainer.sinks.base import figures

TASK = """\
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: words.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{begin}}"
doc_to_choice: "{{ends}}"
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
BEGINS = ("import", "def f(x):", "return", "for i in", "class A", "if not", "with open", "try:", "raise", "from os")
QUESTIONS = 12
ENDS = (" os", " return", " x", " range", "(object", " self", "(path", " pass", " ValueError", " import")


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """Beginnings of lines of Python, and four ways to go on with each."""
    folder = tmp_path_factory.mktemp("task")
    lines = [
        {"begin": BEGINS[i % 10], "ends": [ENDS[(i + i // 10 + 3 * k) % len(ENDS)] for k in range(4)], "right": i % 4}
        for i in range(QUESTIONS)
    ]
    (folder / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "words.yaml").write_text(TASK)
    return folder / "words.yaml"


def test_a_task_of_a_run_is_what_the_harness_finds_of_its_export(gpt2_run, task, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(gpt2_run, tmp_path / "run")
    before = (run / "metrics.jsonl").read_text()
    assert main(["eval", str(run), "--tasks", str(task), "--json", "--device", "cpu"]) == 0
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    folder = export(run, device="cpu").folder
    monkeypatch.chdir(task.parent)
    theirs = lm_eval.simple_evaluate(
        "hf",
        {"pretrained": str(folder), "dtype": "float32", "device": "cpu"},
        tasks=[str(task)],
        batch_size=8,
        log_samples=False,
    )
    expected = theirs["results"]["words"]
    assert found["samples"] == QUESTIONS and {"acc,none", "acc_norm,none", "acc_stderr,none"} <= found.keys()
    assert {key: found[key] for key in found if "," in key} == {key: expected[key] for key in found if "," in key}

    *kept, record = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "".join(kept) == before
    told = json.loads(record)
    assert (told["kind"], told["step"], told["task"]) == ("task", 6, "words")
    assert told["acc,none"] == found["acc,none"]
    assert main(["report", str(run)]) == 0
    assert f"words at step 6: acc {found['acc,none']:.4f}" in capsys.readouterr().out
    card = (folder / "README.md").read_text()
    assert f"| words | 6 | acc,none | {found['acc,none']:.6g} |" in card
    assert any(record.get("task") == "words" for record in read_provenance(folder)["evaluation"])
    # a later evaluation takes nothing from what the card says
    assert main(["eval", str(run), "--tasks", str(task)]) == 0
    assert main(["verify", str(folder), "--against", str(run)]) == 0


@pytest.mark.parametrize(
    ("sections", "ds"),
    [
        ({}, {}),
        pytest.param({"parallel": {"pipeline": 2}}, {}, marks=pytest.mark.slow),
        pytest.param({}, {"sequence_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param({}, {"tensor_parallel": {"autotp_size": 2}}, marks=pytest.mark.slow),
    ],
    ids=["data", "pipeline", "sequence", "tensor"],
)
def test_tasks_asked_while_training_say_what_they_say_afterwards(sections, ds, gpt2_run, text_store, task, tmp_path):
    run = tmp_path / "run"
    scored = task.with_name("scored.yaml")  # by every probability
    scored.write_text(task.read_text().replace("{metric: acc_norm}", "{metric: acc_norm}, {metric: brier_score}"))
    asked = {"every": 3, "batches": 2, "tasks": [str(scored)], "task_every": 2}
    recipe = run_recipe(text_store, run, CONFIGS["gpt2"], eval=asked, **sections)
    train_on_ranks(2, recipe, tiny_json("zero1", **ds))
    records = read_metrics(run)
    (told,) = (record for record in records if record["kind"] == "task")
    assert (told["step"], told["task"], told["samples"]) == (6, "words", QUESTIONS)
    model, tokenizer = load_model(run, "float32")
    afterwards = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    (after,) = ask_tasks(afterwards, [str(scored)], "--tasks", draws=DRAWS)
    assert set(after.metrics) == {name for name in told if "," in name} and "brier_score,none" in after.metrics
    for name, value in after.metrics.items():
        assert told[name] == pytest.approx(value, rel=1e-5), name
    losses = [[r["loss"] for r in own if r["kind"] == "train"] for own in (records, read_metrics(gpt2_run))]
    assert losses[0] == (losses[1] if not sections and not ds else pytest.approx(losses[1], rel=1e-5))
    (row, *_) = collect(run, 100)["tasks"]
    assert row[:2] == ["6", "words"]
    assert figures(told)["task/words/acc"] == told["acc,none"]


def test_a_task_that_cannot_be_asked_while_training_is_refused(text_store, task, tmp_path):
    def refused(**asked: Any) -> str:
        with pytest.raises(UserError) as found:
            make_plan(
                Recipe.model_validate(run_recipe(text_store, tmp_path, CONFIGS["gpt2"], eval={"every": 3, **asked})),
                {},
                1,
            )
        return str(found.value)

    assert "eval.tasks nowhere.yaml: no such file" in refused(tasks=["nowhere.yaml"])
    with pytest.raises(ValueError, match="nothing is evaluated where every is 0"):
        refused(tasks=[str(task)], every=0)
    with pytest.raises(ValueError, match="there are no tasks"):
        refused(task_every=3)
    written = tmp_path / "tells.yaml"
    written.write_text(TASK.replace("multiple_choice", "generate_until").replace("task: words", "task: tells"))
    (tmp_path / "words.jsonl").write_bytes((task.parent / "words.jsonl").read_bytes())
    with pytest.raises(UserError, match=r"eval\.tasks: tells generates text"):
        load_tasks([str(written)], "eval.tasks")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--tasks", "TASK", "--batches", "3"], "--tasks: takes no --store"),
        (["--tasks", "TASK", "--limit", "0"], "--limit 0: expected 1 or more"),
        (["--shots", "1"], "of --tasks"),
        (["--tasks", "broken.yaml"], "has no key `task`"),
    ],
)
def test_what_cannot_be_asked_is_said(words, said, gpt2_run, task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("a: 1\n")
    assert main(["eval", str(gpt2_run), *(str(task) if word == "TASK" else word for word in words)]) == 2
    assert said in capsys.readouterr().err
