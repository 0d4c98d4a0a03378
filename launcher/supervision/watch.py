"""What is known of every rank of a launch, and what has gone wrong with one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data_prep.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USER_ERROR
from ...trainer.keeper.pulse import PHASES, SET_UP, STEP
from ...trainer.keeper.wire import SILENCE_SECONDS, Word
from .switchboard import Switchboard

if TYPE_CHECKING:
    from ...trainer.recipe.recipe import Recipe

FROZEN_SECONDS = 6.0  # stopped by a signal for so long: for good
BEGIN_SECONDS = 60.0  # after the first rank, for the others to begin
_TIMES_LONGEST = 5.0
_SIGTERM = -15


@dataclass(frozen=True)
class Patience:
    """Seconds that a rank may go without a beat."""

    least: float = 120.0  # in any phase
    most: float = 600.0  # in a step, however long the longest one took; twice the longest one if that is more
    unknown: float = 3600.0  # in a phase that has not been seen to end yet

    @classmethod
    def of(cls, recipe: Recipe) -> Patience:
        waits = recipe.parallel
        return cls(waits.patience, waits.timeout * 60, waits.setup_timeout * 60)

    def limit(self, phase: str, longest: float) -> float:
        """Of a phase of which the longest, on any rank, took `longest` seconds; 0: none has ended yet."""
        if phase == SET_UP or longest == 0:
            return self.unknown
        most = self.most if phase == STEP else self.unknown
        return max(self.least, min(_TIMES_LONGEST * longest, most), 2 * longest)


@dataclass
class Member:
    """One rank as its keeper tells of it."""

    rank: int
    host: str = "?"
    began: float | None = None  # by time.monotonic
    pulse: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] | None = None
    told: dict[str, Any] | None = None  # its stacks and what it waits in, when it was asked

    @property
    def phase(self) -> str:
        return (self.end or self.pulse).get("phase", SET_UP)

    @property
    def step(self) -> int:
        return (self.end or self.pulse).get("step", 0)

    @property
    def place(self) -> str:
        return f"step {self.step + 1}" if self.phase == STEP else self.phase

    @property
    def went_well(self) -> bool:
        return self.end is not None and (
            self.end["code"] in (EXIT_DONE, EXIT_STOPPED) or (self.end["code"] == _SIGTERM and self.phase == SET_UP)
        )


@dataclass(frozen=True)
class Mishap:
    """Something that went wrong with a rank.

    Attributes:
        kind: ended | lost (its keeper is gone) | silent (its host says nothing) | frozen | hung | absent.
        consequence: whether it follows from what went wrong elsewhere.
    """

    kind: str
    rank: int
    place: str  # phase or step
    consequence: bool = False
    seconds: float = 0.0
    limit: float = 0.0  # seconds that one that hung had been given

    @property
    def order(self) -> tuple[bool, int]:
        """By which the first cause comes first, among what was found in order of time: certain before guessed."""
        return self.consequence, ("ended", "absent", "frozen", "lost", "silent", "hung").index(self.kind)


class Watch:
    """Over the ranks of one launch."""

    def __init__(self, folder: Path, ranks: range, remote: bool, patience: Patience) -> None:
        self.board = Switchboard(folder, remote)
        self.ranks = ranks
        self.members = [Member(rank) for rank in ranks]
        self.patience = patience
        self.asked = False  # a rank's side was asked to stop
        self.mishaps: dict[int, Mishap] = {}  # by rank, in order of time
        self._looked = time.monotonic()

    def hear(self, seconds: float) -> None:
        """Takes in what the keepers say within that time."""
        for rank, message in self.board.poll(seconds):
            if rank in self.ranks:
                self._take(self.member(rank), message)

    def member(self, rank: int) -> Member:
        return self.members[self.ranks.index(rank)]

    def _take(self, member: Member, message: Word) -> None:
        word = message.pop("word")
        if word == "hello":
            member.host, member.began = message["host"], time.monotonic()
        elif word == "pulse":
            member.pulse = message
        elif word == "asked":
            self.asked = True
        elif word == "stacks":
            member.told = message
        elif word == "ended":
            member.end = message
            self.board.lines[member.rank].send("heard")
            if not member.went_well:
                self._found("ended", member, consequence=message["consequence"])

    def _found(
        self, kind: str, member: Member, seconds: float = 0.0, consequence: bool = False, limit: float = 0.0
    ) -> None:
        mishap = Mishap(kind, member.rank, member.place, consequence, seconds, limit)
        known = self.mishaps.get(mishap.rank)
        if known is None or known.order > mishap.order:
            self.mishaps[mishap.rank] = mishap

    def look(self) -> list[Mishap]:
        """What has gone wrong so far, the first cause first."""
        now, late = time.monotonic(), time.monotonic() - self._looked
        self._looked = now
        # a rank that is stopped for the moment keeps itself and others from beating: none of them hangs
        stopped = any(member.end is None and member.pulse.get("frozen", 0) for member in self.members)
        for member in self.members:
            line = self.board.lines.get(member.rank)
            if line is None or member.end is not None:
                continue
            if late > SILENCE_SECONDS / 2:  # this process itself was stopped: what it has not heard says nothing
                line.heard = now
            if line.closed:
                self._found("lost", member)
            elif now - line.heard > SILENCE_SECONDS:
                self._found("silent", member, now - line.heard)
            elif member.pulse.get("frozen", 0) > FROZEN_SECONDS:
                self._found("frozen", member, member.pulse["frozen"])
            elif (quiet := member.pulse.get("quiet", 0)) > (limit := self.limit(member.phase)) and not stopped:
                self._found("hung", member, quiet, limit=limit)
        began = [member.began for member in self.members if member.began is not None]
        if began and len(began) < len(self.members) and now - min(began) > BEGIN_SECONDS:
            for member in self.members:
                if member.began is None:
                    self._found("absent", member, now - min(began))
        return self.causes()

    def causes(self) -> list[Mishap]:
        """Of ranks that hang, the one that keeps the others waiting comes first."""
        return sorted(self.mishaps.values(), key=lambda mishap: (*mishap.order, *self._behind(mishap)))

    def _behind(self, mishap: Mishap) -> tuple:
        """What speaks for a rank that hangs being the cause: said nothing, waits for nobody, is behind."""
        if mishap.kind != "hung":
            return ()
        member = self.member(mishap.rank)
        waiting = (member.told or {}).get("waiting")
        said, number = waiting is not None, (waiting or {}).get("number")
        return said, number is not None, member.step, number or 0

    def limit(self, phase: str) -> float:
        """Seconds that a rank may go without a beat in this phase: what the run has shown, within bounds."""
        place = PHASES.index(phase)
        longest = [member.pulse["longest"][place] for member in self.members if member.pulse]
        return self.patience.limit(phase, max(longest, default=0.0))

    @property
    def running(self) -> list[Member]:
        """Ranks that have begun and not ended, as far as their keepers can be heard."""
        lines = self.board.lines
        return [m for m in self.members if m.began and m.end is None and not lines[m.rank].closed]

    def silent(self, member: Member) -> bool:
        mishap = self.mishaps.get(member.rank)
        return mishap is not None and mishap.kind == "silent"

    def silent_hosts(self) -> set[str]:
        """Hosts, as they call themselves, of which no rank is heard any more."""
        return {m.host for m in self.members} - {m.host for m in self.members if not self.silent(m)}

    def all_ended(self) -> bool:
        return all(member.end is not None for member in self.members)

    def hosts(self, mishaps: Sequence[Mishap]) -> list[str]:
        return list(dict.fromkeys(self.member(mishap.rank).host for mishap in mishaps))

    def user_error(self) -> Member | None:
        """The rank that saw a mistake of the user's: it outweighs those that it took down with it."""
        return next((m for m in self.members if m.end and m.end["code"] == EXIT_USER_ERROR and m.end["text"]), None)
