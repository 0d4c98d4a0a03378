"""What `zeropipe ckpt import` and `convert` do: checkpoints from and for DeepSpeed elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...data_prep.errors import UserError


def register(actions: argparse._SubParsersAction) -> None:
    """Adds the actions to `zeropipe ckpt`."""
    _register_import(actions)
    _register_convert(actions)


def _register_import(actions: argparse._SubParsersAction) -> None:
    text = "take in a DeepSpeed checkpoint: ZeRO 0-3 or universal, weights, moments and step"
    parser = actions.add_parser("import", help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("source", metavar="SRC", help="what save_checkpoint wrote: the folder, or one tag in it")
    parser.add_argument("--output", metavar="RUN", help="run directory to write; default: the recipe's")
    parser.add_argument("--recipe", metavar="RECIPE", help="of the run that goes on from it")
    parser.add_argument("--config", metavar="FOLDER_OR_JSON", help="instead of a recipe: the model, to export or init")
    parser.add_argument("--samples", type=int, metavar="N", help="of the data consumed; default: steps x global batch")
    parser.add_argument("--trust", action="store_true", help="open its pickles, which can run any code in them")
    parser.set_defaults(run=ckpt_import)


def _register_convert(actions: argparse._SubParsersAction) -> None:
    text = "write a checkpoint for others: a DeepSpeed universal folder, or safetensors (as export)"
    parser = actions.add_parser("convert", help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("source", metavar="RUN", help="a run directory or a checkpoint")
    parser.add_argument("--to", choices=("universal", "safetensors"), default="universal", help="default: %(default)s")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--prefix", default="", help="before the parameters' names, where a module wraps the model")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")
    parser.set_defaults(run=ckpt_convert)


def ckpt_import(args: argparse.Namespace) -> int:
    _quiet()
    from ..export.deepspeed_import import import_checkpoint

    done = import_checkpoint(args.source, args.output, args.recipe, args.config, args.samples, args.trust)
    print(f"imported {done.kind}: {done.parameters} parameters at step {done.step}: {done.path}")
    for note in done.notes:
        print(f"note: {note}")
    return 0


def ckpt_convert(args: argparse.Namespace) -> int:
    _quiet()
    if args.to == "safetensors":
        if args.prefix:
            raise UserError("--prefix: Hugging Face folders have Hugging Face's names; leave it out")
        from ..export.huggingface import export

        print(f"exported: {export(args.source, args.output, overwrite=args.overwrite).folder}")
        return 0
    from ..export.universal import write_universal

    folder = write_universal(args.source, Path(args.output), args.prefix, args.overwrite)
    print(f'DeepSpeed universal checkpoint: {folder}; load it with {{"checkpoint": {{"load_universal": true}}}}')
    return 0


def _quiet() -> None:
    from ..run.quiet import quiet

    quiet()
