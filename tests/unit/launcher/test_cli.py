import argparse
import errno
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from zeropipe.data_prep.command_line import Parser
from zeropipe.data_prep.errors import UserError
from zeropipe.launcher import cli


def zeropipe(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zeropipe.launcher", *words], capture_output=True, text=True, timeout=60, **options
    )


def test_help_is_there():
    done = zeropipe("--help")
    assert done.returncode == 0
    assert "launch" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_help_imports_little():
    """Beyond Python's own library: that of the hostfile's processes and that of recipes' names, 15 ms together."""
    code = (
        "import sys; before = set(sys.modules)\n"
        "from zeropipe.launcher.cli import build_parser\n"
        "parser, verbs = build_parser()\n"
        "[one.format_help() for one in (parser, *verbs.values())]\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before if 'cython' not in name})"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) - set(sys.stdlib_module_names) <= {"zeropipe", "yaml", "_yaml", "psutil"}


@pytest.mark.parametrize("verb", list(cli.build_parser()[1]))
def test_every_verb_has_help_of_its_own(verb):
    parser = cli.build_parser()[1][verb]
    text = parser.format_help()
    assert f"zeropipe {verb}" in text
    assert parser.get_default("run") or parser._subparsers  # a verb runs, or has verbs of its own


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["lanch"], "did you mean 'launch'"),
        (["xyzzy"], "no verb 'xyzzy'"),
        ([], "VERB"),
        (["launch"], "recipe"),
        (["launch", "r", "--hostfil", "h"], "did you mean '--hostfile'"),
        (["launch", "r", "--devices", "two"], "two"),
        (["launch", "r", "--devices", "2", "stray"], "'stray'"),
    ],
)
def test_a_wrong_command_line_is_one_error_line(words, says, capsys):
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert says in err
    assert "Traceback" not in err


def test_overrides_may_stand_anywhere():
    args = cli.parse_command(["launch", "r", "a.b=1", "--devices", "2", "c.d=[1, 2]", "--hostfile", "h", "e.f="])
    assert args.overrides == ["a.b=1", "c.d=[1, 2]", "e.f="]


@pytest.fixture
def verb_that(monkeypatch):
    """A command line whose only verb raises."""

    def use(error: BaseException) -> int:
        def run(_args):
            raise error

        monkeypatch.setattr(cli, "parse_command", lambda _argv: argparse.Namespace(run=run))
        return cli.main(["verb"])

    return use


def test_errors_become_exit_codes(verb_that, capsys):
    assert verb_that(UserError("data/x: no such store")) == 2
    assert capsys.readouterr().err == "error: data/x: no such store\n"
    assert verb_that(KeyboardInterrupt()) == 130
    for number, said in (
        (errno.ENOSPC, "No space left on device; free some space, or choose another place"),
        (
            errno.EACCES,
            "Permission denied; check its permissions, its owner and how it is mounted, or choose another place",
        ),
    ):
        assert verb_that(OSError(number, os.strerror(number), "runs/x")) == 2
        assert capsys.readouterr().err == f"error: runs/x: {said}\n"


def test_a_defect_of_ours_is_not_dressed_up(verb_that):
    with pytest.raises(ZeroDivisionError):
        verb_that(ZeroDivisionError())


def test_a_reader_that_leaves_early():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "zeropipe.launcher", "--help"], stdout=writer, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writer)
    assert done.returncode in (0, 141)
    assert done.stderr == b""


def parsers(parser: Parser) -> Iterator[Parser]:
    """A parser, those of its verbs, and those of their actions."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


def trainer_rank() -> Parser:
    """The parser of `python -m zeropipe.trainer`."""
    from zeropipe.trainer.commands.train import rank_parser

    return rank_parser()


SPELLED = [
    (parser.prog, option)
    for parser in [*parsers(cli.build_parser()[0]), trainer_rank()]
    for action in parser._actions
    for option in action.option_strings
    if option.startswith("--") and set(option[2:]) & {"-", "_"}
]


@pytest.mark.parametrize(("prog", "option"), SPELLED)
@pytest.mark.parametrize("joint", ["-", "_"])
def test_options_take_both_spellings(prog: str, option: str, joint: str):
    parser = next(p for p in [*parsers(cli.build_parser()[0]), trainer_rank()] if p.prog == prog)
    for action in parser._actions:  # the option alone, with any value
        action.required, action.type, action.choices = False, None, None
    word = "--" + option[2:].replace("-", joint).replace("_", joint)
    (action,) = [action for action in parser._actions if option in action.option_strings]
    given = parser.parse_args([word] if action.nargs == 0 else [f"{word}=7"])
    assert getattr(given, action.dest) in (True, "7", ["7"])


def test_only_options_are_respelled():
    parser = Parser()
    parser.add_argument("--top-k")
    parser.add_argument("words", nargs="*")
    given = parser.parse_args(["--top_k=a_b", "x_y", "a_b=c_d", "--", "--top_k"])
    assert (given.top_k, given.words) == ("a_b", ["x_y", "a_b=c_d", "--top_k"])
    assert cli.parse_command(["eval", "x", "--seq_len", "5"]).seq_len == 5
    assert cli.parse_command(["prepare", "--output", "o", "--shard_size", "5"]).shard_size == 5


def test_overrides_of_the_json_reach_the_ranks(monkeypatch):
    from zeropipe.launcher import launch_command

    args = cli.parse_command(["launch", "demo", "ds.zero_optimization.stage=3", "--devices", "2", "duration.steps=5"])
    launch = launch_command.plan_launch(args)
    assert launch.arguments[-2:] == ("ds.zero_optimization.stage=3", "duration.steps=5")
