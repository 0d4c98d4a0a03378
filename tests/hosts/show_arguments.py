"""Stands in for the trainer: each rank writes what it was told into the launch's folder, and leaves its exit note."""

import json
import os
import socket
import sys
from pathlib import Path

from zeropipe.trainer.run.exit_notes import LAUNCH_FOLDER, note_exit

folder, rank = Path(os.environ[LAUNCH_FOLDER]), os.environ["RANK"]
told = {"host": socket.gethostname(), "words": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}
(folder.parent / f"told-{rank}.json").write_text(json.dumps(told))
note_exit(0)
