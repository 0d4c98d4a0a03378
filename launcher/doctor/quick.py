"""What every launch looks at before a rank starts: seconds, where DeepSpeed would look at the first host only."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...data_prep.errors import UserError
from ..hosts.hostfile import Host
from ..hosts.sync import own_code, send_files
from . import probe
from .case import Case, Examination
from .crew import ssh_crew
from .examine import examine

if TYPE_CHECKING:
    from ...trainer.recipe.recipe import Recipe

MOST_TOLD = 20  # hosts
SECONDS = 60.0  # for one answer: a cold environment on shared storage takes its time


def check_hosts(
    hosts: Sequence[Host],
    port: int | None,
    folder: Path | None,
    files: Sequence[str] = (),
    output: Path | None = None,
    sync: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Examination:
    """Every host can take part, and the others reach the first one.

    Args:
        port: of ssh; None: as it is configured.
        folder: of this launch, on shared storage; None: sharing is not looked at.
        files: must be the same on every host.
        output: the run directory.
        environment: of the ranks.
        sync: send what differs to the hosts where it does, and look again.

    Raises:
        UserError: one line for every host that cannot take part, and what to do there.
    """
    case = Case(hosts, files, str(output or Path.cwd()), folder, environment or {}, SECONDS)
    found = examine(case, ssh_crew(hosts, port), thorough=False)
    if sync and (wanted := _behind(found, files)):
        print(f"sending what differs to {', '.join(list(wanted)[:MOST_TOLD])}", flush=True)
        send_files(wanted, port)
        found = examine(case, ssh_crew(hosts, port), thorough=False)
    lines = [f"{finding.host}: {finding.says}; {finding.cure}" for finding in found.in_order()]
    fatal = len(found.fatal)
    if fatal:
        bad = {finding.host for finding in found.fatal}
        told = lines[: min(fatal, MOST_TOLD)]
        more = [f"… and {fatal - MOST_TOLD} more: zeropipe doctor --hostfile … tells all"] if fatal > MOST_TOLD else []
        raise UserError("\n  ".join([f"{len(bad)} of {len(hosts)} hosts cannot take part:", *told, *more]))
    for line in lines[:MOST_TOLD]:
        print(f"note: {line}", file=sys.stderr)
    return found


def _behind(found: Examination, files: Sequence[str]) -> dict[str, list[Path]]:
    """What each host lacks of what can be sent; to a host without this folder, all of it."""
    wanted: dict[str, list[Path]] = {}
    for finding in found.fatal:
        whole = finding.check == "folder"
        lacks = wanted.setdefault(finding.host, []) if whole or finding.check in ("files", "code") else []
        if whole or finding.check == "code":
            lacks += own_code()
        if whole or (finding.check == "files" and not set(map(Path, files)) & set(lacks)):
            there = {} if whole else found.facts[finding.host]["files"]
            lacks += [Path(name) for name in files if there.get(name) != probe.file_hash(Path(name))]
    return wanted


def files_to_compare(recipe: Recipe, *named: str) -> list[str]:
    """What must be the same on every host: the files named, and the manifest of every store that is read."""
    data = recipe.data
    stores = [Path(item.store) for item in (*data.train, *(data.valid or ()), *(data.test or ()))]
    files = [Path(name) for name in named] + [store / "manifest.json" for store in stores]
    return list(dict.fromkeys(str(path) for path in files if path.is_file()))
