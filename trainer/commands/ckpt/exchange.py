"""What `zeropipe ckpt import` and `convert` do: checkpoints from and for DeepSpeed elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path

from ....data_prep.errors import UserError
from ...run.quiet import quiet
from ..arguments import add_verb


def register(actions: argparse._SubParsersAction) -> None:
    """Adds the actions to `zeropipe ckpt`."""
    _register_import(actions)
    _register_convert(actions)


def _register_import(actions: argparse._SubParsersAction) -> None:
    text = "take in a DeepSpeed checkpoint: ZeRO 0-3 or universal, weights, moments and step"
    parser = add_verb(actions, "import", _import, text)
    parser.add_argument("source", metavar="SRC", help="what save_checkpoint wrote: the folder, or one tag in it")
    parser.add_argument("--output", metavar="RUN", help="run directory to write; default: the recipe's")
    parser.add_argument("--recipe", metavar="RECIPE", help="of the run that goes on from it")
    parser.add_argument("--config", metavar="FOLDER_OR_JSON", help="instead of a recipe: the model, to export or init")
    parser.add_argument("--samples", type=int, metavar="N", help="of the data consumed; default: steps x global batch")
    parser.add_argument("--trust", action="store_true", help="open its pickles, which can run any code in them")


def _register_convert(actions: argparse._SubParsersAction) -> None:
    text = "write a checkpoint for others: a DeepSpeed universal folder, or safetensors (as export)"
    parser = add_verb(actions, "convert", _convert, text)
    parser.add_argument("source", metavar="RUN", help="a run directory or a checkpoint")
    parser.add_argument("--to", choices=("universal", "safetensors"), default="universal", help="default: %(default)s")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--prefix", default="", help="before the parameters' names, where a module wraps the model")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")


def _import(args: argparse.Namespace) -> int:
    quiet()  # before the libraries are imported
    from ...export.deepspeed_import import import_checkpoint

    done = import_checkpoint(args.source, args.output, args.recipe, args.config, args.samples, args.trust)
    print(f"imported {done.kind}: {done.parameters} parameters at step {done.step}: {done.path}")
    for note in done.notes:
        print(f"note: {note}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    quiet()  # before the libraries are imported
    if args.to == "safetensors":
        if args.prefix:
            raise UserError("--prefix: Hugging Face folders have Hugging Face's names; leave it out")
        from ...export.huggingface import export

        print(f"exported: {export(args.source, args.output, overwrite=args.overwrite).folder}")
        return 0
    from ...export.universal import write_universal

    folder = write_universal(args.source, Path(args.output), args.prefix, args.overwrite)
    print(f'DeepSpeed universal checkpoint: {folder}; load it with {{"checkpoint": {{"load_universal": true}}}}')
    return 0
