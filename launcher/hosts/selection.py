"""`--include` and `--exclude`, in DeepSpeed's words: `node1@node2:0,2` is all of node1 and two devices of node2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...data_prep.errors import UserError, did_you_mean
from .hostfile import Host


def select_hosts(hosts: Sequence[Host], include: str | None, exclude: str | None) -> tuple[Host, ...]:
    """The hosts that are left, in the hostfile's order.

    Raises:
        UserError: both are given, a host or device is not there, or nothing is left.
    """
    if include and exclude:
        raise UserError("--include and --exclude: give one of them")
    if not include and not exclude:
        return tuple(hosts)
    option = "--include" if include else "--exclude"
    named = _parse(include or exclude or "", option, hosts)
    left = []
    for host in hosts:
        devices = list(range(host.slots))
        chosen = named.get(host.name)
        if include:
            devices = [] if chosen is None else chosen or devices
        elif chosen is not None:
            devices = [device for device in devices if chosen and device not in chosen]
        if devices:
            whole = devices == list(range(host.slots))
            left.append(replace(host, slots=len(devices), devices=None if whole else tuple(devices)))
    if not left:
        raise UserError(f"{option} {include or exclude}: no host is left")
    return tuple(left)


def include_words(hosts: Sequence[Host]) -> str:
    """These hosts as DeepSpeed's `--include` takes them."""
    return "@".join(
        host.name if host.devices is None else f"{host.name}:{','.join(map(str, host.devices))}" for host in hosts
    )


def _parse(text: str, option: str, hosts: Sequence[Host]) -> dict[str, list[int]]:
    """Devices of each host named; none are all of them."""
    slots = {host.name: host.slots for host in hosts}
    if signed := [name for name in slots if "@" in name]:
        raise UserError(
            f"{option}: DeepSpeed cannot tell the @ of {signed[0]} from its own; name the user in ~/.ssh/config"
        )
    found: dict[str, list[int]] = {}
    for item in text.split("@"):
        name, colon, numbers = item.partition(":")
        if name not in slots:
            raise UserError(f"{option} {text}: '{name}' is not in the hostfile{did_you_mean(name, slots)}")
        words = numbers.split(",") if colon else []
        for word in words:
            if not word.isdigit() or int(word) >= slots[name]:
                raise UserError(f"{option} {text}: {name} has the devices 0 to {slots[name] - 1}, not '{word}'")
        found[name] = sorted({*found.get(name, []), *(int(word) for word in words)})
    return found
