"""The base of an adapter: what a checkpoint records of it, so that the adapter never meets another one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...data_prep.errors import UserError
from ..checkpoint.files import MANIFEST
from ..checkpoint.folder import newest_checkpoint, step_folders
from ..ranks.ranks import Ranks

RANDOM = "random"


@dataclass(frozen=True)
class Base:
    """Where the base is (absolute; a checkpoint for a run), and the SHA-256 of what makes it up.

    Of a folder that is the content of its safetensors, of a checkpoint its manifest, which vouches for every byte, of
    random weights the seed.
    """

    init: str
    digest: str

    def record(self) -> dict[str, Any]:
        """As JSON, for a checkpoint's state."""
        return asdict(self)


def base_of(init: str, seed: int, ranks: Ranks | None = None) -> Base:
    """The base that `model.init` names. Collective where `ranks` are given, which share the reading.

    Raises:
        UserError: nothing there to read.
    """
    if init == RANDOM:
        return Base(RANDOM, _digest({"seed": seed}))
    folder = Path(init).absolute()
    ranks = ranks or Ranks()
    if not (folder / "config.json").is_file():
        return ranks.of_main(ranks.together(lambda: _of_checkpoint(folder) if ranks.is_main else None))
    files = sorted(folder.glob("*.safetensors"))
    mine = ranks.together(lambda: _hashes(files[ranks.rank :: ranks.world]), "cannot read the base", folder)
    found = {name: sha for part in ranks.gather_on_main(mine) for name, sha in part.items()}
    return ranks.of_main(Base(str(folder), _digest(found)))


def _of_checkpoint(folder: Path) -> Base:
    # the one that its weights will be read from: with others before it, one that is damaged is passed over
    checkpoint = newest_checkpoint(folder, read=len(step_folders(folder)) > 1)
    return Base(str(checkpoint), json.loads((checkpoint / MANIFEST).read_bytes())["self"])


def locate(recorded: Base, moved: str | Path | None, what: str) -> str:
    """Where the recorded base is: a value of `model.init`.

    Args:
        moved: where somebody says that it is now.
        what: begins the message.

    Raises:
        UserError: it is not there, or is another.
    """
    if recorded.init == RANDOM:
        if moved is not None:
            raise UserError(f"{what}its base is random weights, made from the seed; leave the other base out")
        return RANDOM
    init = str(moved or recorded.init)
    if not Path(init).exists():
        raise UserError(f"{what}the base of its adapter is not at {init}; say --base FOLDER where it is now")
    check_base(recorded, base_of(init, 0), what)
    return init


def check_base(recorded: Base, found: Base, what: str) -> None:
    """UserError where a base is not the recorded one."""
    if found.digest != recorded.digest:
        raise UserError(
            f"{what}its adapter was trained on another base: {recorded.init} (digest {recorded.digest[:12]}…), and "
            f"{found.init} is {found.digest[:12]}…; an adapter is worth nothing on other weights: name its own base"
        )


def _hashes(files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 by name."""
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
