"""`zeropipe eval --tasks` against lm-evaluation-harness's own model of the exported folder."""

import json
import shutil
from pathlib import Path

import lm_eval
import pytest

from zeropipe.launcher.cli import main
from zeropipe.trainer.export.huggingface import export
from zeropipe.trainer.export.provenance import read_provenance

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
ENDS = (" os", " return", " x", " range", "(object", " self", "(path", " pass", " ValueError", " import")


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """Ten beginnings of lines of Python, and four ways to go on with each."""
    folder = tmp_path_factory.mktemp("task")
    lines = [
        {"begin": begin, "ends": [ENDS[(i + k) % len(ENDS)] for k in range(4)], "right": i % 4}
        for i, begin in enumerate(BEGINS)
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
    assert found["samples"] == len(BEGINS) and {"acc,none", "acc_norm,none", "acc_stderr,none"} <= found.keys()
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
