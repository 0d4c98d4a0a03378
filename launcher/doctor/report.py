"""What the doctor found, for a reader: a table, a verdict, and one line for each fault; or all of it as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from .case import Examination
from .checks import BYTES_PER_GIB, Finding

MOST_ROWS = 16  # hosts in the table; of more, those with a fault come first
MOST_LINES = 40  # of findings; the rest is counted
MOST_NAMES = 6
COLUMNS = (
    "host", "", "slots", "devices", "cores", "memory", "/dev/shm", "disk", "python", "torch", "deepspeed", "interface",
)  # fmt: skip


def doctor_report(found: Examination) -> str:
    """The whole report: bounded in length, however many hosts there are."""
    lines = [*_table(found), "", *_measured(found), *finding_lines(list(found.in_order())), outcome(found)]
    return "\n".join(lines)


def outcome(found: Examination) -> str:
    """One line."""
    bad = {name for finding in found.fatal for name in finding.host.split(" - ")}
    total, took = len(found.hosts), f"{found.seconds:.1f} s"
    if bad:
        return f"{len(bad)} of {total} hosts cannot take part ({took})"
    minor = len(found.findings)
    also = f"; {minor} thing{'s' if minor > 1 else ''} to look at" if minor else ""
    return f"{total} host{'s are' if total > 1 else ' is'} ready{also} ({took})"


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """A line for each fault; hosts with the same one share it."""
    groups: dict[tuple[bool, str, str, str], list[str]] = {}
    for finding in findings:  # a host's own name in a cure must not keep it from its like
        cure = finding.cure.replace(finding.host, "HOST") if len(findings) > MOST_ROWS else finding.cure
        groups.setdefault((finding.fatal, finding.check, finding.says, cure), []).append(finding.host)
    lines = [
        f"{'fault' if fatal else 'note '} {check:<13} {_names(hosts)}: {says}\n      → {cure}"
        for (fatal, check, says, cure), hosts in groups.items()
    ]
    more = len(lines) - MOST_LINES
    return lines[:MOST_LINES] + ([f"… and {more} more; --json tells them all"] if more > 0 else [])


def _names(hosts: Sequence[str]) -> str:
    shown = ", ".join(hosts[:MOST_NAMES])
    return shown + (f" and {len(hosts) - MOST_NAMES} more" if len(hosts) > MOST_NAMES else "")


def _table(found: Examination) -> Iterator[str]:
    faulty = {name for finding in found.fatal for name in finding.host.split(" - ")}
    hosts = list(found.hosts)
    if len(hosts) > MOST_ROWS:
        hosts.sort(key=lambda host: host.name not in faulty)
    rows: list[tuple[str, ...]] = [COLUMNS]
    for host in hosts[:MOST_ROWS]:
        mark = "fault" if host.name in faulty else "ok"
        facts = found.facts.get(host.name)
        if facts is None:
            rows.append((host.name, mark, str(host.slots), *("-" * 9)))
            continue
        sizes = (_gib(facts["memory"]), _gib(facts["shared_memory"]), _gib(facts["disk"]))
        versions = (facts["python"], *(facts["versions"].get(name, "-") for name in ("torch", "deepspeed")))
        devices = (str(host.slots), str(facts["accelerators"]), str(facts["cores"]))
        rows.append((host.name, mark, *devices, *sizes, *versions, _interface(found, host.name)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    yield from ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    if len(hosts) > MOST_ROWS:
        yield f"… and {len(hosts) - MOST_ROWS} more hosts"


def _interface(found: Examination, name: str) -> str:
    interface = found.measured.get("interfaces", {}).get(name)
    own = dict(found.facts[name]["addresses"])
    return f"{interface} {own[interface]}" if interface in own else "-"


def _measured(found: Examination) -> Iterator[str]:
    if not found.measured:
        return
    world = sum(host.slots for host in found.hosts)
    speed = found.measured["bandwidth"]
    told = f", {speed / 1e6:,.0f} MB/s a rank" if speed else ""
    yield f"all-reduce among {world} ranks: {1e3 * found.measured['latency']:.2f} ms{told}"
    pairs = found.measured["pairs"]
    if len(pairs) > 1:
        (low, high), (trip, rate) = min(pairs.items(), key=lambda item: item[1][1])
        yield f"slowest of {len(pairs)} pairs of hosts: {low} - {high}, {rate / 1e6:,.0f} MB/s, {1e3 * trip:.2f} ms"
    yield ""


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / BYTES_PER_GIB:.1f} GiB"


def examination_json(found: Examination) -> str:
    """Everything, for programs."""
    measured: dict[str, Any] = {**found.measured}
    if measured:
        measured["pairs"] = {" - ".join(pair): value for pair, value in measured["pairs"].items()}
    findings = [vars(finding) for finding in found.in_order()]
    facts = {host.name: {"slots": host.slots, **found.facts.get(host.name, {})} for host in found.hosts}
    whole = {
        "ready": not found.fatal, "seconds": found.seconds, "master_addr": found.address, "master_port": found.port,
        "findings": findings, "hosts": facts, "all_reduce": measured,
    }  # fmt: skip
    return json.dumps(whole, indent=2)
