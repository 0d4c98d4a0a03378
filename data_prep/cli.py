"""The verbs of this room: `zeropipe prepare`, `inspect`, `verify`, `merge`. The work is imported when it is needed."""

from __future__ import annotations

import argparse
import datetime
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .command_line import Parser
from .errors import EXIT_DONE, EXIT_USER_ERROR, UserError

if TYPE_CHECKING:
    from .making.options import Options
    from .records.settings import RecordOptions
    from .store import TokenStore

RECORDS = ("sft", "dpo", "auto")
UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    _register_prepare(subparsers)
    inspect = subparsers.add_parser("inspect", help="show a token store: its size, its documents as text and tokens")
    inspect.add_argument("store", help="a store directory or a Megatron prefix")
    inspect.add_argument("--document", type=int, action="append", metavar="N", help="show this document (repeatable)")
    inspect.add_argument("--tokens", type=int, default=200, metavar="N", help="of each document, at most (200)")
    inspect.add_argument("--tokenizer", help="a Hugging Face folder, for a bare prefix")
    inspect.set_defaults(run=run_inspect)
    verify = subparsers.add_parser("verify", help="check a token store: sizes, offsets, token ids, digests")
    verify.add_argument("store", nargs="+", help="store directories or Megatron prefixes")
    verify.add_argument("--vocab-size", type=int, metavar="N", help="for a prefix, which does not state its own")
    verify.set_defaults(run=run_verify)
    merge = subparsers.add_parser("merge", help="write one .bin/.idx pair from several stores or prefixes")
    merge.add_argument("stores", nargs="+", help="store directories or Megatron prefixes, in order")
    merge.add_argument("--output", type=Path, required=True, metavar="DIR", help="the store to make, of one shard")
    merge.add_argument("--overwrite", action="store_true", help="replace what is there")
    merge.set_defaults(run=run_merge)


def _register_prepare(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "prepare",
        help="make a token store from a corpus",
        description="Makes a token store from a corpus. A run that was stopped goes on when the command is repeated.",
    )
    source = parser.add_argument_group("corpus")
    source.add_argument("--input", nargs="+", default=[], metavar="PATH", help="files, globs, folders, saved data sets")
    source.add_argument("--builtin", metavar="NAME", help="stdlib: the source code of this Python's standard library")
    source.add_argument("--import", nargs="+", dest="imports", default=[], metavar="PREFIX", help="Megatron .bin/.idx")
    source.add_argument(
        "--format",
        choices=("jsonl", "text", "parquet", "arrow", *RECORDS),
        help="of the files, instead of going by suffix; or what they hold: sft, dpo, auto (records to learn from)",
    )
    source.add_argument("--text-key", default="text", metavar="KEY", help="of the text, `a.b` for nested ones (text)")
    source.add_argument(
        "--text-unit", choices=("file", "paragraph", "line"), default="file", help="what a document is in a text file"
    )
    source.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="at input that is no document")
    source.add_argument(
        "--limit-bytes", type=positive_byte_count, metavar="SIZE", help="read about this much of the input"
    )
    source.add_argument("--limit-documents", type=count, metavar="N", help="keep the first N documents")
    _register_records(parser.add_argument_group("records (--format sft, dpo or auto: as the first record is)"))
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument("--tokenizer", type=Path, metavar="PATH", help="Hugging Face folder or tokenizer.json")
    tokenizer.add_argument("--train-tokenizer", type=int, metavar="N", help="train a byte-level BPE of N tokens")
    tokenizer.add_argument(
        "--train-bytes", type=positive_byte_count, default=32 << 20, metavar="SIZE", help="to train it on (32Mi)"
    )
    tokenizer.add_argument("--eod-token", metavar="TOKEN", help="end of document (<|endoftext|>, else the eos token)")
    select = parser.add_argument_group("selection and order")
    select.add_argument("--min-bytes", type=byte_count, default=0, metavar="SIZE", help="drop shorter documents")
    select.add_argument("--max-bytes", type=byte_count, metavar="SIZE", help="drop longer documents")
    select.add_argument("--keep-regex", metavar="REGEX", help="keep only documents in which it is found")
    select.add_argument("--drop-regex", metavar="REGEX", help="drop documents in which it is found")
    select.add_argument("--deduplicate", action="store_true", help="keep one of documents with equal text")
    select.add_argument("--shuffle", type=count, metavar="SEED", help="shuffle the documents")
    output = parser.add_argument_group("output and work")
    output.add_argument("--output", type=Path, required=True, metavar="DIR", help="the store to make")
    output.add_argument("--overwrite", action="store_true", help="replace what is there")
    output.add_argument(
        "--shard-size", type=positive_byte_count, default=4 << 30, metavar="SIZE", help="of a .bin at most (4Gi)"
    )
    output.add_argument("--workers", type=count, metavar="N", help="processes (one per core; 0: none but this one)")
    output.add_argument(
        "--task-size", type=positive_byte_count, default=32 << 20, metavar="SIZE", help="of input at a time (32Mi)"
    )
    output.add_argument("--mpi", action="store_true", help="under mpirun: the other ranks do the tasks")
    output.add_argument(
        "--cache-memory",
        type=positive_byte_count,
        default=100_000_000,
        metavar="SIZE",
        help="for the encoder of each worker (100M)",
    )
    output.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run_prepare)


def _register_records(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--chat-template", type=Path, metavar="FILE", help="jinja2, instead of the tokenizer's own")
    group.add_argument(
        "--train-on",
        choices=("assistant", "last_assistant", "all"),
        help="what is learnt: the answers and the token that ends each (default), the last answer, or every token",
    )
    group.add_argument("--train-on-inputs", action="store_true", help="the same as --train-on all")
    group.add_argument(
        "--train-trailing", action="store_true", help="learn also what the template writes after an answer's last token"
    )
    group.add_argument("--seq-len", type=positive_count, metavar="N", help="most tokens of a record, a pair's together")
    group.add_argument("--excess", choices=("drop", "truncate", "error"), help="what becomes of longer records (drop)")
    group.add_argument("--template-date", type=iso_date, metavar="DATE", help="for templates that write today's date")


def iso_date(text: str) -> str:
    """A day as 2026-01-31."""
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: not a date; write it like 2026-01-31") from None


def positive_count(text: str) -> int:
    if (number := count(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be more than 0")
    return number


def byte_count(text: str) -> int:
    """Bytes: `500`, `64M`, `4Gi`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}: not a size; write it like 500, 64M or 4Gi")
    return int(float(match[1]) * UNITS[match[2] or ""])


def positive_byte_count(text: str) -> int:
    if (number := byte_count(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be more than 0")
    return number


def count(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: not a whole number from 0 on")
    return int(text)


def _records(args: argparse.Namespace) -> RecordOptions | None:
    """What is asked of records; None if text is read. UserError on options that go with the other."""
    from .records.settings import RecordOptions

    names = ("chat_template", "train_on", "train_on_inputs", "train_trailing", "seq_len", "excess", "template_date")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
    if args.format not in RECORDS:
        if given:
            raise UserError(f"{', '.join(given)}: for records: say what they are with --format sft, dpo or auto")
        return None
    if args.imports:
        raise UserError(f"--format {args.format}: --import takes token files, in which there are no records")
    if args.train_on_inputs and args.train_on not in (None, "all"):
        raise UserError(f"--train-on-inputs is --train-on all, but --train-on {args.train_on} is given")
    if args.excess and args.seq_len is None:
        raise UserError(f"--excess {args.excess}: for records longer than what? give --seq-len too")
    return RecordOptions(
        kind=args.format,
        chat_template=args.chat_template,
        train_on="all" if args.train_on_inputs else args.train_on or "assistant",
        train_trailing=args.train_trailing,
        seq_len=args.seq_len,
        excess=args.excess or "drop",
        date=args.template_date,
    )


def _options(args: argparse.Namespace) -> Options:
    from .corpus.sources import SourceOptions
    from .making.assemble import Assembly
    from .making.options import Options, default_workers
    from .making.tasks import Filters

    records = _records(args)
    unit = {"file": "text", "paragraph": "paragraphs", "line": "lines"}[args.text_unit]
    return Options(
        output=args.output,
        inputs=tuple(args.input),
        builtin=args.builtin,
        source=SourceOptions(None if records else args.format, unit, args.limit_bytes, args.task_size),
        text_key=args.text_key,
        on_error=args.on_error,
        filters=Filters(args.min_bytes, args.max_bytes, args.keep_regex, args.drop_regex),
        tokenizer=args.tokenizer,
        train_tokenizer=args.train_tokenizer,
        train_bytes=args.train_bytes,
        eod_token=args.eod_token,
        records=records,
        assembly=Assembly(args.deduplicate, args.limit_documents, args.shuffle),
        shard_bytes=args.shard_size,
        workers=default_workers() if args.workers is None else args.workers,
        cache_memory=args.cache_memory,
        overwrite=args.overwrite,
        quiet=args.quiet,
    )


def run_prepare(args: argparse.Namespace) -> int:
    if args.imports:
        if args.input or args.builtin or args.train_tokenizer:
            raise UserError("--import takes token files that exist: it goes with neither --input nor --train-tokenizer")
        _records(args)
        from .making.adopt import import_prefixes

        return _summarise(import_prefixes(args.imports, args.output, args.tokenizer, args.eod_token, args.overwrite))
    from .making.prepare import prepare

    if not args.mpi:
        return _summarise(prepare(_options(args)))
    from .making.mpi import ranks

    with ranks() as executor:
        return EXIT_DONE if executor is None else _summarise(prepare(_options(args), executor))


def _summarise(store: TokenStore) -> int:
    from .inspection import describe_store

    print("\n".join(describe_store(store)))
    return EXIT_DONE


def run_inspect(args: argparse.Namespace) -> int:
    from .inspection import show

    show(args.store, args.document or [], args.tokens, args.tokenizer)
    return EXIT_DONE


def run_verify(args: argparse.Namespace) -> int:
    from .making.bars import Bar
    from .verify import verify

    problems = []
    for store in args.store:
        with Bar("verify") as bar:
            problems += verify(store, args.vocab_size, bar)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print(f"whole: {', '.join(args.store)}")
    return EXIT_USER_ERROR if problems else EXIT_DONE


def run_merge(args: argparse.Namespace) -> int:
    from .making.adopt import merge

    return _summarise(merge(args.stores, args.output, args.overwrite))


def main(argv: list[str] | None = None) -> int:
    """This room's verbs alone: `python -m zeropipe.data_prep.cli prepare …`."""
    parser = Parser(prog="zeropipe")
    register(parser.add_subparsers(required=True, parser_class=Parser))
    try:
        args = parser.parse_args(argv)
        return args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
