"""What is wrong with a host, judged from what it and this machine have told; no host is asked here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..hosts.hostfile import Host

BYTES_PER_GIB = 2**30
LEAST_DISK, LEAST_SHARED, LEAST_MEMORY = 2 * BYTES_PER_GIB, 64 * 2**20, BYTES_PER_GIB
NO_DISK = 2**26  # bytes: not even a log fits
STALE_SECONDS = 600  # a build of DeepSpeed's largest extension takes a few minutes
MOST_SKEW = 2.0  # seconds


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong on one host, or between two.

    `fatal`: a launch would fail, hang, or compute something else; the rest is for the user to judge.
    """

    check: str
    host: str
    says: str
    cure: str
    fatal: bool = True


def check_facts(host: Host, found: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Finding]:
    """All that one host's facts show, beside those of this machine (both of `probe.facts`)."""
    yield from _versions(host.name, found, here)
    yield from _files(host.name, found["files"], here["files"])
    yield from _slots(host, found)
    yield from _builds(host.name, found)
    yield from _room(host.name, found)


def _versions(name: str, found: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Finding]:
    if found["python"] != here["python"]:
        cure = "install the same Python there, or make the environment anew with it"
        yield Finding("python", name, f"Python {found['python']}, but {here['python']} here", cure)
    for package in sorted({*found["versions"], *here["versions"]}):
        there, wanted = found["versions"].get(package), here["versions"].get(package)
        if there != wanted:
            says = f"{package} {there or 'is not installed'}, but {wanted or 'is not installed'} here"
            cure = f"ssh {name} pip install {package}=={wanted}" if wanted else f"ssh {name} pip uninstall {package}"
            yield Finding("versions", name, says, cure)
    if found["code"] != here["code"]:
        cure = f"bring it to the same revision (git -C … pull on {name}), or launch with --sync"
        yield Finding("code", name, "ZeroPipe's own code differs from the one here", cure)


def _files(name: str, found: Mapping[str, str | None], here: Mapping[str, str | None]) -> Iterator[Finding]:
    for path, digest in here.items():
        if digest is None or found[path] == digest:
            continue
        full = Path(path).absolute()
        cure = f"put it on shared storage, or: scp {full} {name}:{full}; or launch with --sync"
        yield Finding("files", name, f"{path} {'differs from the one here' if found[path] else 'is missing'}", cure)


def _slots(host: Host, found: Mapping[str, Any]) -> Iterator[Finding]:
    devices, cores = found["accelerators"], found["cores"]
    most, what = (devices, "accelerator") if devices else (cores, "CPU core")
    if host.slots > most:
        says = f"{host.slots} slots, but {most} {what}{'s' if most > 1 else ''}"
        yield Finding("slots", host.name, says, f"write `{host.name} slots={most}` into the hostfile")
    elif devices and host.slots < devices:
        says = f"{host.slots} of its {devices} accelerators are used"
        yield Finding("slots", host.name, says, f"write `{host.name} slots={devices}` into the hostfile", fatal=False)


def check_alike(facts: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """Hosts with accelerators and hosts without do not train together."""
    bare = [name for name, found in facts.items() if not found["accelerators"]]
    if 0 < len(bare) < len(facts):
        for name in bare:
            says = "no accelerator is seen, but others have one"
            yield Finding("slots", name, says, f"look at the driver (ssh {name} nvidia-smi) or leave the host out")


def _builds(name: str, found: Mapping[str, Any]) -> Iterator[Finding]:
    needed = bool(found["accelerators"])  # on CPUs DeepSpeed builds for offload and its own AdamW only
    for path, age in found["build_locks"]:
        if age > STALE_SECONDS:
            says = f"{path} was left {_ago(age)} ago by a build that has died; DeepSpeed waits for it for ever"
            yield Finding("build", name, says, f"ssh {name} rm {path}", needed)
    for tool, package in (("compiler", "g++"), ("ninja", "ninja-build"), ("nvcc", "the CUDA toolkit")):
        if needed and not found[tool]:
            says = f"no {tool}, which DeepSpeed needs to build its extensions"
            yield Finding("build", name, says, f"install {package} on {name}", fatal=False)


def _room(name: str, found: Mapping[str, Any]) -> Iterator[Finding]:
    for what, least, cure in (
        ("disk", LEAST_DISK, "make room, or choose another output: checkpoints are written there"),
        ("shared_memory", LEAST_SHARED, f"ssh {name} mount -o remount,size=8g /dev/shm; in a container: --shm-size=8g"),
        ("memory", LEAST_MEMORY, f"see what uses it: ssh {name} ps aux --sort=-rss"),
    ):
        free = found[what]
        if free is not None and free < least:
            says = f"{free / BYTES_PER_GIB:.2f} GiB of {what.replace('_', ' ')} free"
            yield Finding(what.replace("_", " "), name, says, cure, fatal=what == "disk" and free < NO_DISK)


def check_clock(name: str, skew: float) -> Iterator[Finding]:
    """`skew`: seconds that the host is ahead for certain, whatever the answer took."""
    if abs(skew) > MOST_SKEW:
        says = f"its clock is {abs(skew):.1f} seconds {'ahead of' if skew > 0 else 'behind'} this machine's"
        yield Finding("clock", name, says, f"ssh {name} systemctl restart chrony (or ntpd)", fatal=False)


def check_pairs(pairs: Mapping[tuple[str, str], Sequence[float]]) -> Iterator[Finding]:
    """Links far slower than the others. `pairs`: round-trip seconds and bytes a second between two hosts.

    A host that is in all the slow pairs is named alone.
    """
    if len(pairs) < 3:
        return
    # what is usual is told by the better quarter: one slow host among three is in two of three pairs
    trip = sorted(value[0] for value in pairs.values())[len(pairs) // 4]
    speed = sorted(value[1] for value in pairs.values())[-1 - len(pairs) // 4]
    late = max(4 * trip, trip + 2e-3)
    slow = {pair: value for pair, value in pairs.items() if value[1] < speed / 4 or value[0] > late}
    hosts = sorted({name for pair in pairs for name in pair})
    for name in hosts:
        own = [pair for pair in pairs if name in pair]
        if len(own) > 1 and all(pair in slow for pair in own) and len(own) < len(pairs):
            rate, longest = min(slow[pair][1] for pair in own), max(slow[pair][0] for pair in own)
            says = f"slow to every other host: {_speed(rate)}, {1e3 * longest:.2f} ms there and back"
            yield _slow(name, says, speed)
            slow = {pair: value for pair, value in slow.items() if name not in pair}
    for (low, high), (seconds, rate) in slow.items():
        yield _slow(f"{low} - {high}", f"a slow link: {_speed(rate)}, {1e3 * seconds:.2f} ms there and back", speed)


def _slow(host: str, says: str, usual: float) -> Finding:
    cure = "look at cable, switch port and negotiated speed (ethtool), or leave the host out (--exclude)"
    return Finding("link", host, f"{says}, where {_speed(usual)} is usual", cure, fatal=False)


def _speed(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s" if rate >= 1e8 else f"{rate / 1e6:.2f} MB/s"


def _ago(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.0f} minutes"
