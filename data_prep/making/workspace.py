"""The folder beside the output in which a store is made, its lock, and what it remembers of an unfinished job."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..durable import publish_folder, write_durably
from ..errors import UserError, os_problem
from ..lock import LockedError, lock_file
from ..manifest import Manifest


class Workspace:
    """`.NAME.preparing/` beside the output: `job.json`, `lock`, `tokenizer/`, `parts/`, and what will be the store."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.root = output.with_name(f".{output.name}.preparing")
        self.parts = self.root / "parts"
        self.tokenizer = self.root / "tokenizer"
        self.store = self.root / "store"
        self._job = self.root / "job.json"

    @property
    def encoder(self) -> str | None:
        """Name of the encoder that this job settled on, if it did. All parts must come from one."""
        note = self.root / "encoder"
        return note.read_text() if note.exists() else None

    @encoder.setter
    def encoder(self, name: str) -> None:
        write_durably(self.root / "encoder", name)

    def remembered(self, name: str, value: str) -> str:
        """What was noted under a name when the job first came by here; else notes the value."""
        note = self.root / name
        if not note.exists():
            write_durably(note, value)
        return note.read_text()

    def begin(self, identity: dict[str, Any], overwrite: bool) -> bool:
        """Makes the folder ready for a job; True if an earlier run of the same job left work to go on with.

        UserError if the unfinished work there belongs to another job: it is not thrown away unasked.
        """
        identity = json.loads(json.dumps(identity))
        if self._job.exists():
            before = json.loads(self._job.read_text("utf-8"))
            if before == identity:
                return True
            if not overwrite:
                changed = sorted(key for key in before.keys() | identity.keys() if before.get(key) != identity.get(key))
                raise UserError(
                    f"{self.root}: unfinished work of another command lies here (differs in: {', '.join(changed)}). "
                    "Repeat that command to go on with it, or add --overwrite to throw it away"
                )
        self.clear()
        write_durably(self._job, json.dumps(identity, indent=1))
        return False

    def clear(self) -> None:
        """Removes all work; the lock stays."""
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    def tidy(self) -> bool:
        """After a failure: keeps finished parts for the next run, and removes everything if there are none."""
        if any(self.parts.glob("*.json")):
            for path in self.parts.glob("*.tmp"):
                path.unlink(missing_ok=True)
            shutil.rmtree(self.store, ignore_errors=True)
            return True
        shutil.rmtree(self.root, ignore_errors=True)
        return False

    def publish(self, fingerprint: str) -> None:
        """Puts the finished store in its place at one stroke and removes the work."""
        write_durably(self.root / "published", fingerprint)
        publish_folder(self.store, self.output, self.root / "replaced")
        self.discard()

    def discard(self) -> None:
        """Removes all work; `published` last, so that a kill meanwhile leaves what says that the work is no use."""
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in ("published", "lock"):
                path.unlink()
        shutil.rmtree(self.root)

    def was_published(self, settings: dict[str, Any]) -> bool:
        """Whether a run with these settings was killed between putting its store in place and removing the work."""
        note = self.root / "published"
        if not (self.output.exists() and note.exists()):
            return False
        manifest = Manifest.load(self.output)
        return manifest.fingerprint == note.read_text() and manifest.settings == json.loads(json.dumps(settings))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the output against every other prepare, on this host or, where the file system knows locks, another."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = lock_file(self.root / "lock")
        except LockedError as error:
            raise UserError(f"{self.output}: another prepare is making this store ({error.holder})") from None
        except OSError as error:
            raise UserError(f"{self.output}: cannot write there: {error.strerror}") from None
        try:
            yield
        except UserError as error:
            if self.tidy():
                raise UserError(f"{error}; what is finished stays in {self.root}") from None
            raise
        finally:
            lock.close()


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turns a full or unwritable disk into a UserError that says what helps, and that nothing is lost."""
    try:
        yield
    except OSError as error:
        problem, advice = os_problem(error, "cannot write", where)
        if not advice:
            raise
        raise UserError(f"{problem}; {advice}, and repeat the command: it will go on") from None
