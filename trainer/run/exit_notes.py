"""How a rank tells `zeropipe launch` why it ended: the launchers in between lose exit codes or change them."""

from __future__ import annotations

import os
from pathlib import Path

LAUNCH_FOLDER = "ZEROPIPE_LAUNCH"  # set by `zeropipe launch`: a folder of this launch alone, seen by every rank


def note_exit(code: int) -> None:
    """Leaves this rank's exit code for `zeropipe launch`; does nothing in a rank that was started otherwise.

    The last thing a rank does. A rank that leaves no note has crashed.
    """
    folder = os.environ.get(LAUNCH_FOLDER)
    if not folder:
        return
    note = Path(folder) / f"exit-{int(os.environ.get('RANK', '0')):05d}"
    try:
        note.write_text(str(code), encoding="ascii")
    except OSError:  # the disk may be the very thing that failed: the launcher then has the exit status alone
        return


def read_notes(folder: Path) -> dict[int, int]:
    """Exit code of every rank that has left one."""
    notes = {}
    for note in folder.glob("exit-*"):
        text = note.read_text(encoding="ascii")
        if text:
            notes[int(note.name.removeprefix("exit-"))] = int(text)
    return notes
