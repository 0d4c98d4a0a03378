"""README and docs say what there is: every `zeropipe …` line of a block is understood, every key in a table is one."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import zeropipe
from zeropipe.data_prep.errors import UserError
from zeropipe.launcher.cli import parse_command
from zeropipe.trainer.plan.deepspeed_keys import TOP_LEVEL

ROOT = Path(__file__).parents[2]
MEASURED = ("performance.md", "verification.md")  # blocks of what programs printed
DOCS = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in MEASURED]
SESSIONS = [page for page in DOCS if "```console" in page.read_text("utf-8")]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]


def commands(text: str) -> list[str]:
    """The lines of unmarked blocks and of sessions that begin with `zeropipe` and leave nothing out, comments and line
    ends joined.
    """
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    said = [block.replace("\\\n", " ") for kind, block in blocks if kind in ("", "console")]
    lines = [line.strip().removeprefix("$ ") for block in said for line in block.splitlines()]
    return [line for line in lines if line.startswith("zeropipe ") and "…" not in line and "..." not in line]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_command_is_understood(page):
    for line in commands(page.read_text("utf-8")):
        words = shlex.split(re.split(r"\s[|;]\s", line)[0], comments=True)
        if any(word in words for word in ("--help", "--version")):
            continue
        try:
            parse_command(words[1:])
        except (UserError, SystemExit) as error:
            pytest.fail(f"{page.name}: {line}: {error}")


def test_the_readme_has_commands_and_a_wrong_one_is_seen():
    assert len(commands(PAGES[0].read_text("utf-8"))) >= 20
    with pytest.raises(UserError, match="nowhere"):
        parse_command(["eval", "runs/x", "--nowhere"])


def test_every_key_of_the_tables_is_one():
    text = (ROOT / "docs" / "moving.md").read_text("utf-8")
    schema = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text())
    recipe, ds = re.findall(r"recipe `([a-z_.]+)`", text), re.findall(r"json `([a-z_0-9]+)`", text)
    assert len(recipe) > 40 and len(ds) > 10
    for key in recipe:
        assert known(schema, schema, key.split(".")), key
    assert set(ds) <= set(TOP_LEVEL)


@pytest.mark.slow
def test_names_of_trainer_trl_and_peft_are_theirs():
    """Of their configuration classes as they are installed; those of the other programs were looked up by hand."""
    from peft import LoraConfig
    from transformers import TrainingArguments
    from trl import DPOConfig, SFTConfig

    text = (ROOT / "docs" / "moving.md").read_text("utf-8")
    trainer, _, others = text.partition("## Hugging Face's Trainer")[2].partition("## TRL and peft")
    named = {name for row in first_cells(trainer) for name in re.findall(r"`(\w+)`", row)} - {"TrainingArguments"}
    assert len(named) >= 15
    assert named <= {field.name for field in fields(TrainingArguments)}
    for config in (SFTConfig, DPOConfig, LoraConfig):
        rows = [row for row in first_cells(others) if config.__name__ in row]
        named = {name for row in rows for name in re.findall(r"\b[a-z_]{1,}\b", re.sub("of|`", " ", row))}
        assert named and named <= {field.name for field in fields(config)}, config.__name__


def first_cells(text: str) -> list[str]:
    return [line.split("|")[1] for line in text.splitlines() if line.startswith("| ") and "---" not in line]


def test_blocks_of_yaml_and_python_name_what_there_is():
    schema = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text())
    found = 0
    for page in PAGES:
        for kind, block in re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S):
            if kind == "yaml":
                for key in flattened(yaml.safe_load(block)):
                    found += 1
                    assert known(schema, schema, [part for part in key.split(".") if part]), f"{page.name}: {key}"
            if kind == "python" and "import zeropipe" in block:
                for name in re.findall(r"zeropipe\.(\w+)", block):
                    found += 1
                    assert hasattr(zeropipe, name), f"{page.name}: zeropipe.{name}"
    assert found > 25
    for example in (ROOT / "examples").glob("*.py"):
        compile(text := example.read_text("utf-8"), example, "exec")
        names = re.findall(r"zeropipe\.(\w+)\(", text)
        assert names and all(hasattr(zeropipe, name) for name in names), example.name


def flattened(value: object, prefix: str = "") -> list[str]:
    """Dotted keys of nested mappings, but of those whose keys are another's (a model's configuration)."""
    if not isinstance(value, dict) or prefix == "model.config":
        return [prefix]
    return [key for name, inner in value.items() for key in flattened(inner, f"{prefix}.{name}" if prefix else name)]


def test_the_reference_has_every_verb_and_key():
    site = runpy.run_path(str(ROOT / "scripts" / "site_pages.py"))
    line = site["command_line"]()
    assert all(f"## `zeropipe {verb}`" in line for verb in ("prepare", "launch", "ckpt prune", "report", "verify"))
    assert "--tasks TASK" in line
    schema = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text())
    assert all(f"| `{key}` |" in site["keys_of_recipe"](schema) for key in ("tasks", "seq_len", "spike", "muon_lr"))


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "site_pages.py"), str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "zeropipe launch" in (tmp_path / "site" / "cli" / "index.html").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", SESSIONS, ids=lambda path: path.name)
def test_what_a_page_prints_is_what_comes(page, tmp_path):
    """Every command of its sessions, one after the other in an empty folder; numbers may differ, words may not."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command, expected in sessions(page.read_text("utf-8")):
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        assert re.fullmatch(pattern_of(expected), masked(done.stdout)), f"{command}\n{done.stdout}"


def sessions(text: str) -> list[tuple[str, str]]:
    """Commands of console blocks, and what they print."""
    blocks = re.findall(r"^```console\n(.*?)^```$", text, re.M | re.S)
    found = [re.match(r"(.*)\n((?:.*\n)*)", own) for block in blocks for own in re.split(r"^\$ ", block, flags=re.M)]
    return [(own[1], own[2]) for own in found if own and own[1]]


def pattern_of(expected: str) -> str:
    """Of what may be printed: a line `…` stands for any lines, and … in a line for anything in it."""
    lines = masked(expected).splitlines()
    return "".join(
        r"(?:.*\n)*?" if line.strip() == "…" else ".*".join(map(re.escape, line.split("…"))) + r"\n" for line in lines
    )


def masked(text: str) -> str:
    """Without digests, curves, durations and numbers, and with one space for any."""
    for pattern, sign in (
        (r"\b[0-9a-f]{40,}\b", "#"),
        (r"[▁▂▃▄▅▆▇█]+", "▁"),
        (r"[+-]?\d[\d,.]*(?:e[+-]?\d+)?", "#"),
        (r"(?:#[dhms])+", "#s"),
        (r"[ \t]+", " "),
    ):
        text = re.sub(pattern, sign, text)
    return text


def known(schema: dict, node: dict, path: list[str]) -> bool:
    """Whether a dotted key leads somewhere in a JSON schema."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    if not path:
        return True
    options = [node, *node.get("anyOf", ()), *node.get("allOf", ())]
    return any(
        known(schema, option["properties"][path[0]], path[1:])
        if path[0] in option.get("properties", {})
        else option is not node and known(schema, option, path)
        for option in options
    )
