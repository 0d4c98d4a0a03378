"""How long the doctor takes: on three real ssh hosts with its all-reduce, and on a thousand that are simulated.

The three hosts are network namespaces of this machine and share its cores, so three times the work of a host is done
here. Beside it what it cannot do without: one ssh command a host, all at once, that has Python import
torch.distributed.
The thousand answer from memory after 50 ms, but for eight of which four hang and four fail; what is measured is the
doctor's own work: asking, judging, and the page that it writes.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
TURNS, LIMIT = 3, 10.0  # seconds
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


def main() -> None:
    print(__doc__)
    print(f"load before: {os.getloadavg()[0]:.2f}")
    from tests.hosts.netns import virtual_hosts, what_is_missing

    if missing := what_is_missing():
        print(f"three hosts: not measured, {missing}")
    else:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "work").mkdir()
            with virtual_hosts(Path(folder), 3, loopback_names=True, dead_interfaces=True) as hosts:
                three_hosts(hosts, Path(folder, "work"))
    thousand_hosts()
    print(f"load after: {os.getloadavg()[0]:.2f}")


def three_hosts(hosts: list, folder: Path) -> None:
    (folder / "hostfile").write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    doctor, least = [], []
    for _ in range(TURNS):
        doctor.append(seconds(hosts[0].command([str(BIN / "zeropipe"), "doctor", "--hostfile", "hostfile"]), folder))
        imports = f"{sys.executable} -c 'import torch.distributed'"
        words = " & ".join(f"ssh {host.name} {imports!r}" for host in hosts)
        least.append(seconds(hosts[0].command(["bash", "-c", f"{words} & wait"]), folder))
    whole = statistics.median(doctor)
    verdict = "" if whole <= LIMIT else f", above {LIMIT:g} s"
    print(f"three hosts: {whole:.1f} s ({min(doctor):.1f} to {max(doctor):.1f}){verdict}")
    print(f"  imports alone: {statistics.median(least):.1f} s; doctor / imports {whole / statistics.median(least):.2f}")


def seconds(command: list[str], folder: Path) -> float:
    began = time.monotonic()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def thousand_hosts() -> None:
    import pytest

    from tests.unit.launcher.doctor.test_checks import GOOD
    from tests.unit.launcher.doctor.test_examine import MANY, pretend
    from zeropipe.launcher.doctor import probe
    from zeropipe.launcher.doctor.report import doctor_report, examination_json

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "facts", lambda *_: GOOD)
        began = time.monotonic()
        found, at_once = pretend(MANY, thorough=True)
        took = time.monotonic() - began
    text = doctor_report(found)
    print(f"a thousand hosts: {took:.1f} s, of which 4.0 s are waiting for those that hang; {at_once} asked at once")
    print(f"  the page: {len(text.splitlines())} lines, {len(text):,} bytes; --json: {len(examination_json(found)):,}")


if __name__ == "__main__":
    main()
