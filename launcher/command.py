"""The `deepspeed …` command line and the environment of its ranks, for one machine and for a hostfile."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data_prep.errors import UserError
from .backends import PDSH, given_words, launcher_arguments, rank_words
from .hosts.hostfile import Host
from .hosts.selection import include_words

DEEPSPEED_HOSTFILE = Path("/job/hostfile")  # taken by DeepSpeed, unasked, wherever it exists
# DeepSpeed itself sends only PYTHON*, MLFLOW*, MV2*, UCX* and NCCL* to other hosts
FORWARDED = re.compile(
    r"(OMP|GLOO|NCCL|UCX|FI|DS|HF|TORCH|PYTORCH|CUDA|TRITON|TRANSFORMERS|TOKENIZERS|WANDB|MLFLOW|TRACKIO|ZEROPIPE)_\w+"
    r"|LD_LIBRARY_PATH"
)
# a command line is visible to everyone on a host
_SECRET_NAME = re.compile(r"TOKEN$|KEY$|SECRET|PASSWORD")
_SECRET_VALUE = re.compile(r"://[^/\s@]*@|[?&]\w*(token|key|secret|password)=", re.IGNORECASE)
NOT_FORWARDED = {"DS_ENV_FILE", "DS_ACCELERATOR", "HF_HOME", "CUDA_VISIBLE_DEVICES"}  # true of this host only
QUIET = {"PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error"}


@dataclass(frozen=True)
class Launch:
    """One launch: what every rank is told, and where the ranks are."""

    arguments: tuple[str, ...]  # of `zeropipe.trainer`, as each rank shall see them
    devices: int  # ranks in all
    hostfile: Path | None = None  # None: this machine
    hosts: tuple[Host, ...] = ()
    selected: bool = False  # `hosts` are not all of the hostfile
    device_ids: tuple[int, ...] | None = None  # of this machine, where only some may be used
    ssh_port: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    bind_cores: bool = False
    sync: bool = False  # files and code that differ on a host are sent there
    verbose: bool = False
    module: str = "zeropipe.trainer"  # what each rank runs
    backend: str = PDSH  # DeepSpeed's launcher of the other hosts' ranks
    launcher_args: str = ""  # for pdsh, mpirun or srun
    node: int | None = None  # which of `hosts` this machine is, where each is launched on by itself, without ssh

    @property
    def remote(self) -> bool:
        """Whether this launch starts ranks on other hosts."""
        return self.hostfile is not None and self.node is None

    @property
    def shells(self) -> bool:
        """Whether words and variables reach the ranks through pdsh and the shells of hosts."""
        return self.remote and self.backend == PDSH

    @property
    def ranks(self) -> range:
        """The numbers of the ranks that this launch starts."""
        if self.node is None:
            return range(self.devices)
        first = sum(host.slots for host in self.hosts[: self.node])
        return range(first, first + self.hosts[self.node].slots)


def deepspeed_command(launch: Launch, variables: Sequence[str] = ()) -> list[str]:
    """The words of the command, to be run without a shell; `variables`: names of those to be sent to other hosts."""
    words = [deepspeed_program()]
    if not launch.verbose:
        words += ["--log_level", "critical"]  # its errors only repeat, less clearly, how the ranks ended
    words += _where(launch, variables)
    for flag, value in (("--master_addr", launch.master_addr), ("--master_port", launch.master_port)):
        if value is not None:
            words += [flag, str(value)]
    if launch.bind_cores:
        words.append("--bind_cores_to_rank")
    words += rank_words(launch.backend, launch.module)
    return words + [remote_word(word) if launch.shells else word for word in launch.arguments]


def _where(launch: Launch, variables: Sequence[str]) -> list[str]:
    if launch.remote:
        return _remote_flags(launch, variables)
    if launch.node is not None:
        flags = ["--hostfile", str(launch.hostfile), "--no_ssh", "--node_rank", str(launch.node)]
        return flags + _included(launch)
    flags = []
    if DEEPSPEED_HOSTFILE.exists():
        flags += ["--hostfile", os.devnull]
    if launch.device_ids is not None:
        return [*flags, "--include", "localhost:" + ",".join(map(str, launch.device_ids))]
    return [*flags, "--num_accelerators", str(launch.devices)]


def _included(launch: Launch) -> list[str]:
    return ["--include", include_words(launch.hosts)] if launch.selected else []


def _remote_flags(launch: Launch, variables: Sequence[str]) -> list[str]:
    # with one host left, DeepSpeed would start the ranks here, whatever the host's name; the ssh check looks at the
    # first host only, and ours has looked at all of them
    flags = ["--hostfile", str(launch.hostfile), "--force_multi", "--no_ssh_check", *_included(launch)]
    if launch.backend != PDSH:
        flags += ["--launcher", launch.backend]
    elif not launch.verbose:
        # DeepSpeed does not pass the log level on to other hosts, but this flag's value, which their shells split
        flags += ["--enable_each_rank_log", "None --log_level critical"]
    if launch.ssh_port is not None:
        flags += ["--ssh_port", str(launch.ssh_port)]
    return flags + given_words(launcher_arguments(launch.backend, launch.hosts, variables), launch.launcher_args)


def deepspeed_program() -> str:
    """The `deepspeed` of this Python's environment, by its short name where the shell would find the same one."""
    program = Path(sys.executable).parent / "deepspeed"
    found = shutil.which("deepspeed")
    if found and (not program.exists() or os.path.samefile(found, program)):
        return "deepspeed"
    return str(program)


def remote_word(word: str) -> str:
    """`word`, so written that it reaches a rank unchanged through DeepSpeed, pdsh and the remote shell.

    DeepSpeed wraps words with a space into double quotes and escapes only the double quotes in them; the rest goes as
    it is to pdsh, which replaces %h, %n, %u, and to the remote shell, which expands everything else.
    """
    if "\n" in word:
        raise UserError(f"'{word}': an argument with a line break cannot be sent to other hosts")
    word = word.replace("%", "%%")
    if " " in word:
        return re.sub(r"([\\$`])", r"\\\1", word)
    return shlex.quote(word)


def rank_environment(environ: Mapping[str, str], launch: Launch, accelerators: int, cores: int) -> dict[str, str]:
    """What to add to the environment of the ranks; what the user has set stays."""
    wanted = {} if launch.verbose else dict(QUIET)
    if accelerators == 0:
        wanted["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed looks for others and says that it found none
        if not launch.remote:
            wanted["OMP_NUM_THREADS"] = str(max(1, cores // len(launch.ranks)))  # else every rank takes every core
    return {name: value for name, value in wanted.items() if name not in environ}


def is_secret(name: str, value: str) -> bool:
    """Whether a variable is named like a secret, or holds an address with one in it."""
    return bool(_SECRET_NAME.search(name) or _SECRET_VALUE.search(value))


def forwarded_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """What of this environment matters to ranks on other hosts; no secret."""
    return {
        name: environ[name]
        for name in sorted(environ)
        if FORWARDED.fullmatch(name) and not is_secret(name, environ[name]) and name not in NOT_FORWARDED
    }


def forwarded_lines(environ: Mapping[str, str], user_files: Sequence[Path]) -> list[str]:
    """Lines of the `.deepspeed_env` that carries the ranks' environment to other hosts.

    The user's own files come last. Values reach the ranks as they are written: DeepSpeed would have every host's shell
    run what stands in `$(…)`. Comments and blank lines, which DeepSpeed chokes on, are dropped.

    Raises:
        UserError: a line of a file is not NAME=VALUE, or a PATH that would have to be expanded.
    """
    lines = [f"PATH={Path(sys.executable).parent}:$PATH"]  # programs beside this Python: ninja, for DeepSpeed's builds
    said = [*forwarded_variables(environ).items(), *user_variables(user_files).items()]
    return lines + [f"{name}={_escaped(value)}" for name, value in said]


def user_variables(files: Sequence[Path]) -> dict[str, str]:
    """What the user's own files of variables say; raises as `forwarded_lines`."""
    said = {}
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            name, found, value = line.partition("=")
            if not (found and re.fullmatch(r"[A-Za-z_]\w*", name)):
                raise UserError(f"{path}, line {number}: expected NAME=VALUE, found '{line}'")
            if name == "PATH" and "$" in value:  # a rank would find no program
                raise UserError(f"{path}, line {number}: nothing is expanded in it; write PATH out, without `$`")
            said[name] = value
    return said


def _escaped(value: str) -> str:
    # DeepSpeed puts values with any of these characters into double quotes
    return re.sub(r'([\\"$`])', r"\\\1", value.replace("\n", " ")).replace("%", "%%")


def user_environment_files(environ: Mapping[str, str]) -> list[Path]:
    """The `.deepspeed_env` files that DeepSpeed would read: in the home folder, then in the current one."""
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    files = [folder / name for folder in (Path.home(), Path.cwd())]
    return [path for path in dict.fromkeys(files) if path.is_file()]


def shell_line(words: Sequence[str], environment: Mapping[str, str]) -> str:
    """A line to paste into a shell."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(words)])
