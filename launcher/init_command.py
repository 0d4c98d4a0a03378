"""`zeropipe init DIR`: copies the shipped recipes and DeepSpeed JSONs out, to edit."""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path

from ..data_prep.errors import UserError
from ..trainer.commands.arguments import add_verb

ROOMS = {"recipes": (".yaml", ".json"), "ds_configs": (".json",)}


def register(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(verbs, "init", run, "copy the shipped recipes and DeepSpeed JSONs out, to edit")
    parser.add_argument("directory", metavar="DIR", help="gets recipes/ and ds_configs/; existing files are kept")
    parser.add_argument("--force", action="store_true", help="replace files that exist and differ")


def run(args: argparse.Namespace) -> int:
    directory = Path(args.directory)
    files = shipped_files()
    changed = [
        name for name, text in files.items() if (directory / name).exists() and (directory / name).read_text() != text
    ]
    if changed and not args.force:
        raise UserError(f"{directory}: {', '.join(changed)} exist and differ; use another folder, or --force")
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")
    print(f"{len(files)} files in {directory}/recipes and {directory}/ds_configs")
    print(f"next: zeropipe plan {directory}/recipes/demo.yaml --deepspeed_config {directory}/ds_configs/demo.json")
    return 0


def shipped_files() -> dict[str, str]:
    """Relative path → text of everything that comes with the package."""
    return {
        f"{room}/{entry.name}": entry.read_text(encoding="utf-8")
        for room, suffixes in ROOMS.items()
        for entry in sorted(resources.files(f"zeropipe.{room}").iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(suffixes)
    }
