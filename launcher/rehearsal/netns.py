"""Real hosts on one machine: each a network namespace with its own address, name, /etc/hosts, ssh settings and sshd.

Processes and files are shared with the machine, as processes and a shared file system would be seen by ssh.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...trainer.ranks.ports import FIRST, LAST

NETWORK = "10.77.0"  # inside the namespaces only: nothing of it is visible on the machine, so runs do not clash
DEAD_NETWORK = "10.66.0"  # of an interface that is up, and first in every list, and leads nowhere
SSHD = "/usr/sbin/sshd"
NEEDED = ("ip", "ssh", "ssh-keygen", "pdsh", "unshare", "nsenter", "hostname", SSHD)


def what_is_missing() -> str | None:
    """Why hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [program for program in NEEDED if shutil.which(program) is None]
    return f"not installed: {', '.join(absent)} (make setup as root installs them)" if absent else None


@dataclass(frozen=True)
class VirtualHost:
    """One host: `name` and `address` as the others see it, `namespace` as `ip netns` calls it, the port of its sshd.

    `make` makes it (again), with its links and its sshd.
    """

    name: str
    address: str
    namespace: str
    port: int
    folder: Path
    make: Callable[[], None] = field(repr=False, compare=False)

    def command(self, words: Sequence[str]) -> list[str]:
        """`words`, to be run on this host."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name, *words]
        return ["ip", "netns", "exec", self.namespace, *named]

    def run(self, words: Sequence[str], **options) -> subprocess.CompletedProcess[str]:
        """Runs a command on this host, as `subprocess.run` does, with its output as text."""
        return subprocess.run(self.command(words), capture_output=True, text=True, **{"timeout": 120, **options})

    @contextlib.contextmanager
    def own_folder(self, folder: Path, size: str = "64m") -> Iterator[None]:
        """Gives what ssh starts on this host an empty file system of its own at `folder`."""
        with self._mounted(["-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], folder):
            yield

    @contextlib.contextmanager
    def own_file(self, path: Path, text: str) -> Iterator[None]:
        """Gives what ssh starts on this host another text in the file `path`."""
        with tempfile.TemporaryDirectory() as folder:
            other = Path(folder) / path.name
            other.write_text(text)
            with self._mounted(["--bind", str(other), str(path)], path):
                yield

    @contextlib.contextmanager
    def _mounted(self, words: Sequence[str], where: Path) -> Iterator[None]:
        """A file system for the sshd of this host alone, and for what it starts."""
        with contextlib.ExitStack() as undo:
            # of each, its oldest process, which outlives what is done to the others
            oldest_last = sorted(self.processes(), reverse=True)
            views = {}
            for process in oldest_last:
                with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
                    views[os.readlink(f"/proc/{process}/ns/mnt")] = process
            for process in views.values():
                inside = ["nsenter", "--target", str(process), "--mount"]
                subprocess.run([*inside, "mount", *words], check=True)
                undo.callback(subprocess.run, [*inside, "umount", "--lazy", str(where)], check=True)
            yield

    def processes(self) -> list[int]:
        """Ids of all that runs on this host; at rest, that is its sshd."""
        return [int(word) for word in subprocess.check_output(["ip", "netns", "pids", self.namespace]).split()]

    @contextlib.contextmanager
    def without_sshd(self) -> Iterator[None]:
        """Nobody gets in any more; who is in stays."""
        for process in self.processes():
            if b"[listener]" in Path(f"/proc/{process}/cmdline").read_bytes():
                os.kill(process, signal.SIGKILL)
        try:
            yield
        finally:
            _start_sshd(self)

    @contextlib.contextmanager
    def gone(self) -> Iterator[None]:
        """The host is taken down with all that runs on it, and is there again afterwards."""
        _remove_namespace(self.namespace)
        try:
            yield
        finally:
            self.make()

    @contextlib.contextmanager
    def cut_off(self) -> Iterator[None]:
        """Its link is down; no socket is closed."""
        self.set_link("down")
        try:
            yield
        finally:
            self.set_link("up")

    @contextlib.contextmanager
    def preloaded(self, folder: Path, source: str) -> Iterator[None]:
        """What ssh starts on this host calls the C functions of `source` in place of the system's."""
        library = folder / f"{self.name}.so"
        compile_it = ["cc", "-shared", "-fPIC", "-o", str(library), "-x", "c", "-"]
        subprocess.run(compile_it, input=source, text=True, check=True)
        for process in self.processes():
            os.kill(process, signal.SIGKILL)
        _start_sshd(self, "-o", f"SetEnv=LD_PRELOAD={library}")
        try:
            yield
        finally:
            for process in self.processes():
                os.kill(process, signal.SIGKILL)
            _start_sshd(self)

    @contextlib.contextmanager
    def firewall(self) -> Iterator[None]:
        """Nobody gets an answer from the ports that ranks meet at; ssh goes on."""
        rule = ["blackhole", "ipproto", "tcp", "sport", f"{FIRST}-{LAST}"]
        _ip("-n", self.namespace, "rule", "add", *rule)
        try:
            yield
        finally:
            _ip("-n", self.namespace, "rule", "del", *rule)

    def set_link(self, state: str) -> None:
        """Cuts the host off (`down`), without closing a socket, or connects it again (`up`)."""
        _ip("-n", self.namespace, "link", "set", "eth0", state)

    @contextlib.contextmanager
    def slow_link(self, rate: str) -> Iterator[None]:
        """What the host sends is held to `rate`, such as 10mbit."""
        tc = ["tc", "-n", self.namespace, "qdisc"]
        limit = ["tbf", "rate", rate, "burst", "16kb", "latency", "400ms"]
        subprocess.run([*tc, "add", "dev", "eth0", "root", *limit], check=True, timeout=30)
        try:
            yield
        finally:
            subprocess.run([*tc, "del", "dev", "eth0", "root"], check=True, timeout=30)


@contextlib.contextmanager
def virtual_hosts(
    folder: Path,
    count: int = 2,
    port: int = 2222,
    loopback_names: bool = False,
    dead_interfaces: bool = False,
    ports: Mapping[str, int] | None = None,
) -> Iterator[list[VirtualHost]]:
    """Makes node1 … nodeN, which reach each other by ssh without a password; `folder` keeps their keys and settings.

    Args:
        loopback_names: every host calls itself 127.0.1.1, as Debian's installer sets it up.
        dead_interfaces: every host has a further interface, first in every list, that is up and reaches nobody.
        ports: of the sshd of single hosts, by name; ssh is told of them in its configuration.
    """
    _sweep()
    tag = f"zp{os.getpid()}"
    switch, hosts = f"{tag}sw", []

    def maker(number: int) -> Callable[[], None]:
        def make() -> None:
            host = hosts[number - 1]
            _ip("netns", "add", host.namespace)
            if dead_interfaces:
                _connect(host, switch, f"dead{number}", "aaa0", f"{DEAD_NETWORK}.{number}", "up")
            _connect(host, switch, f"port{number}", "eth0", host.address, "master", "bridge", "up")
            _configure(host, hosts, folder, "127.0.1.1" if loopback_names else host.address)
            _start_sshd(host)

        return make

    for number in range(1, count + 1):
        name = f"node{number}"
        own = (ports or {}).get(name, port)
        hosts.append(VirtualHost(name, f"{NETWORK}.{number}", f"{tag}n{number}", own, folder, maker(number)))
    with contextlib.ExitStack() as undo:
        _keys(folder)
        undo.callback(_remove_namespace, switch)
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for host in hosts:
            undo.callback(_remove_namespace, host.namespace)
            host.make()
        _wait_for_ssh(hosts)
        yield hosts


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _remove_namespace(name: str) -> None:
    """Ends everything that runs in a namespace, and removes it with its links and files. Nothing of it may be there."""
    inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
    for process in inside:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def _sweep() -> None:
    """Removes what a killed run has left: the namespaces whose maker is gone."""
    for line in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.splitlines():
        name = line.split()[0]
        maker = name.removeprefix("zp").split("n")[0].split("s")[0]
        if name.startswith("zp") and maker.isdigit() and not Path(f"/proc/{maker}").exists():
            _remove_namespace(name)


def _keys(folder: Path) -> None:
    for name in ("host_key", "id"):
        key = folder / name
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True, timeout=30)
    authorized = folder / "authorized_keys"
    authorized.write_bytes((folder / "id.pub").read_bytes())
    authorized.chmod(0o600)


def _connect(host: VirtualHost, switch: str, port: str, interface: str, address: str, *state: str) -> None:
    """An interface of a host, and the end of its cable at the switch, set as `ip link set` takes it."""
    # the same hardware address when it is made again, for the others have it in their caches
    hardware = ":".join(f"{int(part):02x}" for part in ("2", "0", *address.split(".")))
    here = [interface, "address", hardware, "netns", host.namespace]
    _ip("link", "add", *here, "type", "veth", "peer", "name", port, "netns", switch)
    _ip("-n", switch, "link", "set", port, *state)
    _ip("-n", host.namespace, "addr", "add", f"{address}/24", "dev", interface)
    for link in ("lo", interface):
        _ip("-n", host.namespace, "link", "set", link, "up")


def _configure(host: VirtualHost, hosts: Sequence[VirtualHost], folder: Path, own: str) -> None:
    """Files that `ip netns exec` mounts over those in /etc for this host, whose name means `own` to itself."""
    etc = Path("/etc/netns") / host.namespace
    (etc / "ssh").mkdir(parents=True)
    names = "".join(f"{own if other == host else other.address} {other.name}\n" for other in hosts)
    (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    ports = "".join(f"Host {other.name} {other.address}\n  Port {other.port}\n" for other in hosts)
    (etc / "ssh" / "ssh_config").write_text(
        f"{ports}Host *\n  IdentityFile {folder}/id\n  StrictHostKeyChecking no\n"
        "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    (folder / f"sshd-{host.name}.conf").write_text(
        f"Port {host.port}\nListenAddress 0.0.0.0\nHostKey {folder}/host_key\nStrictModes no\nUsePAM no\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPermitRootLogin yes\nPidFile none\nMaxStartups 100\n"
    )


def _start_sshd(host: VirtualHost, *options: str) -> None:
    Path("/run/sshd").mkdir(exist_ok=True)
    settings = str(host.folder / f"sshd-{host.name}")
    words = [SSHD, "-f", f"{settings}.conf", "-E", f"{settings}.log", *options]
    host.run(words, check=True)


def _wait_for_ssh(hosts: Sequence[VirtualHost], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    for host in hosts:
        while (done := hosts[0].run(["ssh", "-o", "BatchMode=yes", host.name, "hostname"])).stdout.strip() != host.name:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no ssh to {host.name} within {seconds:.0f} s: {done.stderr.strip()}")
            time.sleep(0.1)
