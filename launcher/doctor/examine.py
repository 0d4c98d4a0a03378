"""The examination: what every host is asked, in order, and what comes of it."""

from __future__ import annotations

import asyncio
import secrets
import time
from pathlib import Path

from . import probe
from .case import Case, Examination
from .checks import Finding, check_alike, check_clock, check_facts
from .collective import run_all_reduce, start_ranks
from .crew import Crew
from .network import find_meeting, try_ports


def examine(case: Case, crew: Crew, thorough: bool) -> Examination:
    """Asks every host; `thorough` adds clocks, locks, ports both ways and an all-reduce to what a launch looks at."""

    async def all_of_it() -> Examination:
        began = time.monotonic()
        found = Examination(case.hosts)
        try:
            await _examine(case, crew, found, thorough)
        finally:
            await crew.close()
        found.seconds = time.monotonic() - began
        return found

    return asyncio.run(all_of_it())


async def _examine(case: Case, crew: Crew, found: Examination, thorough: bool) -> None:
    names = [host.name for host in case.hosts]
    asked = asyncio.create_task(crew.ask(names, "facts", case.seconds, files=list(case.files), output=case.output))
    here = await asyncio.to_thread(probe.facts, case.files, case.output)
    found.facts = await asked
    for host in case.hosts:
        if host.name in found.facts:
            found.findings += check_facts(host, found.facts[host.name], here)
    found.findings += check_alike(found.facts)
    ready = not found.findings and not crew.silent and thorough
    if ready:
        await start_ranks(case, crew)
    if case.folder is not None:
        await _shared(case, crew, found, case.folder, thorough)
    await find_meeting(case, crew, found)
    if thorough:
        await _clocks(case, crew, found)
        await try_ports(case, crew, found)
        if ready and not found.fatal and not crew.silent:
            await run_all_reduce(case, crew, found)
    found.findings += [Finding(why.check, name, why.says, why.cure) for name, why in crew.silent.items()]


async def _shared(case: Case, crew: Crew, found: Examination, folder: Path, thorough: bool) -> None:
    """Every host reads what this one has written into `folder`, and this one what they have."""
    names, text = list(found.facts), secrets.token_hex(8)
    probe.leave_token(f"{folder}/token-here", text)
    seen = await crew.ask(names, "tokens", case.seconds, folder=str(folder))
    away = {name for name, tokens in seen.items() if tokens.get("token-here") != text}
    own = {name: {"name": str(i), "text": text} for i, name in enumerate(seen) if name not in away}
    written = await crew.ask(list(own), "token", case.seconds, own, folder=str(folder))
    back = probe.read_tokens(str(folder))
    for name in seen:
        shared = name in written and back.get(f"token-{own[name]['name']}") == text
        if name in away or (name in written and not shared):
            says = f"{folder.parent} is not the folder it is here"
            found.findings.append(Finding("storage", name, says, "the run directory must be on storage that all share"))
    if thorough and len(written) > 1:
        first, *rest = written
        lock = str(folder / "lock")
        await crew.ask([first], "lock", case.seconds, path=lock)
        for name, held in (await crew.ask(rest, "locked", case.seconds, path=lock)).items():
            if not held:
                says = f"a lock that {first} holds in {folder.parent} is not seen here"
                cure = "mount it with working locks (NFS: without nolock; Lustre: -o flock), or never start a run twice"
                found.findings.append(Finding("locks", name, says, cure, fatal=False))


async def _clocks(case: Case, crew: Crew, found: Examination) -> None:
    for name, read in (await crew.ask(list(found.facts), "clock", case.seconds)).items():
        asked, answered = crew.times[name]  # it was read in between: only what is more than that is its own
        found.findings += check_clock(name, max(0.0, read - answered) + min(0.0, read - asked))
