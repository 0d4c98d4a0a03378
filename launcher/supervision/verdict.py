"""Words for how a launch ended: what each rank was doing, and the first cause, last."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from typing import Any

from .watch import Member, Mishap, Watch

_TAIL_LINES = 15
# last lines of errors, and what of the doctor's checks is about such
_DOCTOR = (
    (
        r"connectFullMesh|Connection (refused|reset)|No route to host|Network is unreachable|NCCL|[Tt]imed out",
        "the ports between all hosts, both ways, and ends with an all-reduce of all ranks",
    ),
    (
        r"No space left|[Qq]uota exceeded|Read-only file system|No locks available",
        "room and locks of shared folders (--shared FOLDER)",
    ),
    (
        r"No module named|cannot import name|undefined symbol|cannot open shared object",
        "versions and code of all hosts",
    ),
    (r"CUDA (error|driver)|no CUDA|HIP error", "the devices of every host"),
)


def tell(watch: Watch, mishaps: Sequence[Mishap]) -> str:
    """Stacks of the ranks that were asked for them, ranks that failed in consequence, and at last the first cause."""
    first = mishaps[0]
    parts = [_stacks(watch.members)]
    others = [mishap for mishap in mishaps[1:] if mishap.kind == "ended" and not mishap.consequence]
    parts += [f"{who(watch.member(f.rank))} {_what(watch, f)}" for f in others[:8]]
    member = watch.member(first.rank)
    parts += [_own_words(member), _doctor(watch, first), f"error: {who(member)} {_what(watch, first)}"]
    return "\n".join(part for part in parts if part)


def who(member: Member) -> str:
    return f"rank {member.rank} on {member.host}"


def _what(watch: Watch, mishap: Mishap) -> str:
    member = watch.member(mishap.rank)
    place, seconds = mishap.place, f"{mishap.seconds:.0f} s"
    if mishap.kind == "ended":
        return f"{_ending(member.end or {})}, in {place}"
    if mishap.kind == "lost":
        alone = all(f.kind == "lost" for f in watch.mishaps.values() if watch.member(f.rank).host == member.host)
        gone = "is gone, with its keeper" if not alone else "is gone, with all that ran there for it"
        return f"{gone}: killed, or its host went down; it was in {place}"
    if mishap.kind == "silent":
        return f"has not been heard for {seconds}: its host is down or cut off; it was in {place}"
    if mishap.kind == "frozen":
        return f"was stopped by a signal (SIGSTOP) {seconds} ago and not set going again, in {place}"
    if mishap.kind == "absent":
        return f"did not begin within {seconds} of the first one: see above what its host says"
    waits = _waiting(member)
    return f"hangs in {place}: nothing for {seconds}, where {mishap.limit:.0f} s are the limit{waits}"


def _doctor(watch: Watch, first: Mishap) -> str:
    """What `zeropipe doctor` would tell of a cause; nothing of one that it does not look at."""
    hosts = {member.host for member in watch.members}
    said = (watch.member(first.rank).end or {}).get("text", "").strip().rpartition("\n")[2]
    if first.kind in ("silent", "absent") and len(hosts) > 1:
        looks = "which hosts answer"
    else:
        looks = next((looks for pattern, looks in _DOCTOR if re.search(pattern, said)), "")
    hostfile = " --hostfile HOSTFILE" if len(hosts) > 1 else ""
    return f"zeropipe doctor{hostfile}: looks at {looks}" if looks else ""


def _ending(end: dict[str, Any]) -> str:
    code, text = end.get("code", 0), end.get("text", "").strip()
    if text:
        return f"failed: {text.splitlines()[-1].strip()}"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"was ended by {name}{' (out of memory?)' if code == -signal.SIGKILL else ''}"
    return f"ended with exit code {code} without a word"


def _own_words(member: Member) -> str:
    """What the rank itself said: its traceback, or the stack of its crash and the end of its stderr."""
    end = member.end or {}
    text = end.get("text", "").strip()
    if not text and end:
        text = "\n".join([*end["tail"].splitlines()[-_TAIL_LINES:], _told_stacks(end["stacks"])])
    return f"--- {who(member)} said:\n{text}" if text else ""


def _told_stacks(text: str) -> str:
    """As faulthandler wrote them, without addresses, by which equal ones would differ, and lists of modules."""
    return re.sub(r"0x[0-9a-f]+", "0x…", re.sub(r"(?m)^Extension modules: .*\n?", "", text)).strip()


def _waiting(member: Member) -> str:
    if member.told is None:
        return ""
    waiting = member.told["waiting"]
    if waiting is None:
        return "; it did not say what it waits for"
    if "unknown" in waiting:
        return ""
    if not waiting:
        return "; it waits in no collective"
    return f"; it waits in {waiting['name']} number {waiting['number']} of group {waiting['group']} {waiting['sizes']}"


def _stacks(members: Sequence[Member]) -> str:
    """Of ranks with the same stacks, once."""
    alike: dict[str, list[Member]] = {}
    for member in members:
        if member.told is not None:
            text = _told_stacks(member.told["stacks"]) or "(no stacks: it did not answer)"
            alike.setdefault(f"{member.place}{_waiting(member)}\n{text}", []).append(member)
    shown = []
    for text, same in alike.items():
        ranks = ", ".join(str(member.rank) for member in same[:16]) + (" …" if len(same) > 16 else "")
        hosts = ", ".join(dict.fromkeys(member.host for member in same[:16]))
        shown.append(f"--- rank{'s' if len(same) > 1 else ''} {ranks} on {hosts}, in {text}")
    return "\n".join(shown)
