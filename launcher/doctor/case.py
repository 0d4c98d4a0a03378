"""What is examined, and what came out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..hosts.hostfile import Host
from .checks import Finding


@dataclass(frozen=True)
class Case:
    """What is to be examined.

    `files`: those that every host must have as they are here. `folder`: on storage that all hosts share, made here;
    None where there is nothing to share. `environment`: of the ranks of the all-reduce.
    """

    hosts: Sequence[Host]
    files: Sequence[str] = ()
    output: str = "."
    folder: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 60.0  # for any one answer


@dataclass
class Examination:
    """What came out: `address` and `port` of the first host, reached by the others, for the ranks to meet at."""

    hosts: Sequence[Host]
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    address: str | None = None
    port: int | None = None
    measured: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def fatal(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.fatal]

    def in_order(self) -> Iterator[Finding]:
        """The fatal ones first, by check, then by host as the hostfile has them."""
        order = {host.name: i for i, host in enumerate(self.hosts)}
        yield from sorted(self.findings, key=lambda f: (not f.fatal, f.check, order.get(f.host, len(order))))
