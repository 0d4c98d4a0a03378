"""Every fault in turn, at random places of one small run that has to survive them all, and what became of each."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...data_prep.errors import UserError
from ...trainer.checkpoint.folder import newest_checkpoint, verify_checkpoints
from ...trainer.keeper.pulse import EVALUATION, SAVING, SET_UP, STEP
from ...trainer.metrics.reading import read_lines, read_metrics
from .drive import Outcome, launch_words, plain_words, rehearse
from .faults import ENDS, EVAL_EVERY, FAULTS, GOES_ON, REFUSED, SAVE_EVERY, START, Fault, Scene
from .netns import VirtualHost
from .rank import HARM, IN_A_RANK, Harm

_STEPS_AFTERWARDS = 6  # after a fault that a run survives
_CODES = {GOES_ON: 4, REFUSED: 2}


@dataclass(frozen=True)
class Rehearsed:
    """One fault and what became of the launch.

    Attributes:
        place: phase, with the step where it is one.
        wrong: what is not as it must be; empty if all is.
    """

    fault: str
    place: str
    rank: int
    outcome: Outcome
    wrong: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        found = dataclasses.asdict(self.outcome)
        return {"fault": self.fault, "place": self.place, "rank": self.rank, "wrong": list(self.wrong)} | {
            key: found[key] for key in ("seconds", "code", "left", "right", "last")
        }


class Matrix:
    """Rehearsals on hosts of which each has `slots` ranks; `folder` holds `recipe.yaml` and `deepspeed.json`."""

    def __init__(self, hosts: Sequence[VirtualHost], slots: int, folder: Path, seed: int) -> None:
        self.hosts, self.slots, self.folder, self.run = hosts, slots, folder, folder / "run"
        self._random = random.Random(seed)
        self._turns = {name: self._random.randrange(4) for name in FAULTS}
        self._environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        self._evaluates = recipe["eval"]["every"] > 0

    def lines(self, names: Sequence[str], times: int) -> Iterator[Rehearsed]:
        """Each fault so often, each time in its next phase, at a random step."""
        for _ in range(times):
            yield from (self.line(name) for name in names)

    def line(self, name: str, plain: bool = False) -> Rehearsed:
        """One fault; `plain`: to `deepspeed` alone, on a fresh run."""
        fault, run = FAULTS[name], self.folder / ("plain" if plain else "run")
        harm = self._harm(name, fault, run)
        host = self.hosts[harm.rank // self.slots]
        scene = Scene(host, self.folder, run, self._random)
        if plain:  # which forwards nothing else
            forwarded = {**self._environment, HARM: harm.write()}
            text = "".join(f"{key}={value}\n" for key, value in forwarded.items())
            (self.folder / ".deepspeed_env").write_text(text, encoding="utf-8")
        outcome = rehearse(
            self._words(fault, run, plain),
            self.hosts[0],
            host.name,
            harm,
            lambda launch: fault.act(scene, launch),
            {**self._environment, **dict(fault.environment)},
            gone_on=(lambda: last_step(run) >= harm.step + _STEPS_AFTERWARDS) if fault.outcome == GOES_ON else None,
        )
        place = f"{STEP} {harm.step + 1}" if harm.phase == STEP else harm.phase
        wrong = self._wrong(fault, outcome, run)
        notes = scene.notes if wrong else []
        return Rehearsed(name, START if fault.before else place, harm.rank, outcome, (*wrong, *notes))

    def audited(self) -> str:
        """What the ledger says of the run after all faults.

        Raises:
            UserError: a sample was left out or taken twice.
        """
        from ...trainer.metrics.audit import audit

        if not self.run.exists():
            return "no rank began: nothing to audit"
        found = audit(self.run)
        if found.defects:
            raise UserError(f"{self.run}: {found.defects[0]}")
        kept = f"{found.steps} steps, {found.samples:,} samples, {found.resumes} resumes"
        return f"{kept}: each sample once and in order"

    def _harm(self, name: str, fault: Fault, run: Path) -> Harm:
        phases = [phase for phase in fault.phases if phase != EVALUATION or self._evaluates]
        phase = phases[self._turns[name] % len(phases)]
        self._turns[name] += 1
        first = checkpointed_step(run) + 1
        spread = {STEP: 8, EVALUATION: EVAL_EVERY, SAVING: SAVE_EVERY}.get(phase, 1)
        ranks = range(0 if name in IN_A_RANK else self.slots, len(self.hosts) * self.slots)
        step = first + self._random.randrange(spread)
        return Harm(name, self._random.choice(ranks), SET_UP if fault.before else phase, step, str(self.folder))

    def _words(self, fault: Fault, run: Path, plain: bool) -> list[str]:
        slots = [fault.slots if fault.slots and number == 1 else self.slots for number in range(len(self.hosts))]
        lines = [f"{host.name} slots={count}\n" for host, count in zip(self.hosts, slots, strict=True)]
        (self.folder / "hostfile").write_text("".join(lines))
        overrides = [f"output={run}"]
        if fault.slots:
            overrides.append(f"batch.global={sum(slots)}")
        files = ("recipe.yaml", "deepspeed.json", "hostfile", overrides)
        return plain_words(*files, self.hosts[0].address) if plain else launch_words(*files)

    def _wrong(self, fault: Fault, outcome: Outcome, run: Path) -> tuple[str, ...]:
        code = fault.code if fault.outcome == ENDS else _CODES[fault.outcome]
        wrong = []
        if outcome.seconds is None:
            wrong.append("did not end")
        elif fault.outcome != GOES_ON and outcome.seconds > fault.seconds + _limit_of_a_hang(outcome):
            wrong.append(f"took more than {fault.seconds:.0f} s")
        if outcome.code != code:
            wrong.append(f"exit code {outcome.code}, expected {code}")
        if outcome.left:
            wrong.append(f"{outcome.left} processes left")
        if not outcome.right:
            wrong.append(f"last line: {outcome.last}")
        return (*wrong, *lost(run, fault.lost))


def last_step(run: Path) -> int:
    """The last step that is on record; 0: none."""
    try:
        return max((record["step"] for record in read_lines(run) if record["kind"] == "train"), default=0)
    except UserError:
        return 0


def checkpointed_step(run: Path) -> int:
    """Steps of the newest whole checkpoint; 0: there is none."""
    try:
        return int(newest_checkpoint(run).name.removeprefix("step-"))
    except UserError:
        return 0


def _limit_of_a_hang(outcome: Outcome) -> float:
    """Seconds that a rank that hangs was given, by what is said last; 0: it does not hang."""
    found = re.search(r"where (\d+) s are the limit", outcome.last)
    return float(found[1]) if found else 0.0


def lost(run: Path, most: int) -> list[str]:
    """What a run has lost: its newest checkpoint is damaged, or more than `most` steps are not in it."""
    step = checkpointed_step(run)
    if step and (problems := verify_checkpoints(run / "checkpoints" / f"step-{step:08d}").popitem()[1]):
        return [f"checkpoint: {problems[0]}"]
    try:
        taken = max((record["step"] for record in read_metrics(run) if record["kind"] == "train"), default=0)
    except UserError:
        return []
    return [f"{taken - step} steps are lost"] if taken - step > most else []


def write_line(line: Rehearsed, as_json: bool) -> str:
    """One line of the table, or of JSON."""
    if as_json:
        return json.dumps(line.as_json())
    took = "-" if line.outcome.seconds is None else f"{line.outcome.seconds:.1f}"
    code = "-" if line.outcome.code is None else str(line.outcome.code)
    verdict = "; ".join(line.wrong) or "as it must be"
    return f"{line.fault:<17} {line.place:<11} {line.rank:>4} {took:>7} {code:>5} {line.outcome.left:>4}  {verdict}"


TABLE_HEADING = f"{'fault':<17} {'place':<11} {'rank':>4} {'seconds':>7} {'code':>5} {'left':>4}"


def load_note() -> str:
    """How busy this machine is: the seconds mean little on one that others use."""
    return f"load average {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores"
