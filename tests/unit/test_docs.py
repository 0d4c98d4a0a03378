"""README and docs say what there is: every `zeropipe …` line of a block is understood, every key in a table is one."""

import json
import re
import shlex
from pathlib import Path

import pytest

from zeropipe.data_prep.errors import UserError
from zeropipe.launcher.cli import parse_command
from zeropipe.trainer.plan.deepspeed_keys import TOP_LEVEL

ROOT = Path(__file__).parents[2]
MEASURED = ("performance.md", "verification.md")  # blocks of what programs printed
DOCS = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in MEASURED]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]


def commands(text: str) -> list[str]:
    """The lines of unmarked blocks that begin with `zeropipe` and leave nothing out, comments and line ends joined."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    lines = [line.strip() for kind, block in blocks if not kind for line in block.replace("\\\n", " ").splitlines()]
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
