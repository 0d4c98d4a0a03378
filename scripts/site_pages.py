"""The site: README, docs/ and two pages of reference, made from the command line's parsers and the recipe's schema."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zeropipe.launcher.cli import build_parser

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
NAV = {
    "Use": ["index.md", "first_run.md", "moving.md", "launch.md", "faults.md"],
    "Reference": ["cli.md", "recipe.md", "legality.md", "families.md", "deepspeed_features.md"],
    "Explained": ["supervision.md", "mixtures.md", "deepspeed_notes.md", "scale.md"],
    "Measured": ["performance.md", "verification.md"],
    "Project": ["CONTRIBUTING.md", "CHANGELOG.md"],
}


def main(work: Path, target: Path) -> int:
    """Collects the pages in `work` and builds the site into `target`; any warning is an error."""
    shutil.rmtree(work, ignore_errors=True)
    source = work / "pages"
    shutil.copytree(ROOT / "docs", source)
    for name in PAGES:
        (source / name).write_text(linked((ROOT / name).read_text("utf-8")), "utf-8")
    (source / "index.md").write_text(linked((ROOT / "README.md").read_text("utf-8")), "utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        (source / page.name).write_text(linked(page.read_text("utf-8")), "utf-8")
    (source / "cli.md").write_text(command_line(), "utf-8")
    schema = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text("utf-8"))
    (source / "recipe.md").write_text(keys_of_recipe(schema), "utf-8")
    listed = {page for pages in NAV.values() for page in pages}
    more = sorted(page.name for page in source.glob("*.md") if page.name not in listed)
    nav = [{section: pages} for section, pages in ({**NAV, "More": more} if more else NAV).items()]
    config = {
        "site_name": "ZeroPipe",
        "docs_dir": str(source.absolute()),
        "site_dir": str(target.absolute()),
        "theme": {"name": "material", "font": False, "features": ["navigation.sections"]},
        "markdown_extensions": ["tables", "fenced_code", "toc"],
        "plugins": ["search"],
        "validation": {"links": {"anchors": "warn"}},
        "nav": nav,
    }
    (work / "mkdocs.yml").write_text(json.dumps(config), "utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(work / "mkdocs.yml")]
    return subprocess.run(command, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}).returncode


def linked(text: str) -> str:
    """Links between files of the repository as links between pages; those to files that are no page lose the link."""

    def page(match: re.Match[str]) -> str:
        words, target = match[1], match[2]
        if "://" in target or target.startswith("#"):
            return match[0]
        name = Path(target.partition("#")[0]).name
        name = "index.md" if name == "README.md" else name
        is_page = name in (*PAGES, "index.md") or (ROOT / "docs" / name).is_file()
        return f"[{words}]({name})" if is_page else words

    return re.sub(r"\[([^\]\n]*)\]\(([^)\s]+)\)", page, text)


def command_line() -> str:
    """Every verb's help, and that of its actions."""
    _, verbs = build_parser()
    lines = ["# The command line", "", "What `zeropipe VERB --help` prints.", ""]
    for name, parser in sorted(verbs.items()):
        for heading, own in [(name, parser), *_actions(name, parser)]:
            own.formatter_class = _fixed(own.formatter_class)
            lines += [f"## `zeropipe {heading}`", "", "```", own.format_help().rstrip(), "```", ""]
    return "\n".join(lines)


def _actions(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from ((f"{name} {own}", inner) for own, inner in action.choices.items())


def _fixed(formatter: Any) -> Any:
    """The same whatever terminal it is made on."""
    return lambda prog: formatter(prog, width=100)


def keys_of_recipe(schema: dict[str, Any]) -> str:
    """Every key of a recipe, section by section."""
    lines = ["# The recipe", "", "Every key, from the schema that editors read (`recipes/recipe.schema.json`).", ""]
    lines += _table(schema, schema)
    for name, section in sorted(schema.get("$defs", {}).items()):
        if section.get("properties"):
            lines += ["", f"## {name}", "", *_table(section, schema)]
    return "\n".join(lines) + "\n"


def _table(section: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    rows = ["| key | | default | |", "|---|---|---|---|"]
    for key, value in section["properties"].items():
        default = "" if "default" not in value else f"`{json.dumps(value['default'])}`"
        said = value.get("description", "").replace("\n", " ").replace("|", "\\|")
        cells = f"`{key}`", _kind(value).replace("|", "\\|"), default.replace("|", "\\|"), said
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _kind(value: dict[str, Any]) -> str:
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in value or "const" in value:
        return ", ".join(f"`{json.dumps(item)}`" for item in value.get("enum", [value.get("const")]))
    if options := value.get("anyOf") or value.get("oneOf") or value.get("allOf"):
        return " or ".join(dict.fromkeys(_kind(option) for option in options))
    return str(value.get("type", "any"))


if __name__ == "__main__":
    sys.exit(main(ROOT / "build" / "site-source", Path(sys.argv[1])))
