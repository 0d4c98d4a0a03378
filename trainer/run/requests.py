"""What people ask of a run under way, by a file in its directory: any host that sees the directory can ask."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from ...data_prep.durable import write_durably
from ...data_prep.errors import UserError, as_user_error

SAVE, STOP = "save", "stop"
_FILE = ".request"


def take_request(output: Path) -> str | None:
    """What was asked since this was last called, if anything; the file is then gone. For one rank."""
    file = output / _FILE
    with contextlib.suppress(OSError):  # nothing there, as nearly always; or a file system that fails where it matters
        asked = file.read_text(encoding="utf-8").strip()
        file.unlink()
        return asked
    return None


def ask(output: Path, what: str, patience: float) -> None:
    """Asks the run in `output`, and waits until it has taken notice.

    Raises:
        UserError: none is under way there, or it took no notice within `patience` seconds.
    """
    if not (output / "recipe.yaml").is_file():
        raise UserError(f"{output}: not a run directory (no recipe.yaml in it)")
    file = output / _FILE
    try:
        write_durably(file, what + "\n")
        ends = time.monotonic() + patience
        while file.exists():
            if time.monotonic() > ends:
                file.unlink(missing_ok=True)
                raise UserError(
                    f"{output}: no run took notice within {patience:.0f} s: none is under way, or a step of it takes "
                    "longer (--wait SECONDS)"
                )
            time.sleep(0.1)
    except OSError as error:
        raise as_user_error(error, "the run cannot be asked", file) from error
