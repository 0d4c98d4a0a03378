"""The verb `export`. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse

from ...data_prep.errors import UserError
from ...data_prep.making.bars import Bar
from ...data_prep.sizes import format_bytes
from ..run.quiet import quiet
from .arguments import MODEL_DTYPES, add_base_argument, add_checkpoint_argument, add_verb
from .chosen import chosen_checkpoint


def register(verbs: argparse._SubParsersAction) -> None:
    text = "write a Hugging Face folder, verified against the logits that training computed"
    parser = add_verb(verbs, "export", run, text)
    parser.add_argument("run_directory", metavar="RUN", help="a run directory or a checkpoint")
    add_checkpoint_argument(parser)
    parser.add_argument("--output", metavar="FOLDER", help="default: RUN/export")
    parser.add_argument("--dtype", choices=MODEL_DTYPES, help="default: what the run computed with")
    parser.add_argument("--max-shard-gb", type=float, default=4.0, metavar="GB", help="largest file; default: 4")
    parser.add_argument("--device", help="that verifies, such as cpu for a model larger than one GPU")
    parser.add_argument("--adapter", action="store_true", help="write the adapter alone, for peft; needs --output")
    add_base_argument(parser)
    parser.add_argument(
        "--merge-onto",
        choices=("dequantized", "original"),
        help="what a qlora adapter is folded into: what was trained on (default), or the weights before quantisation",
    )
    parser.add_argument(
        "--gguf", choices=("f16", "q8_0"), help="also write model-TYPE.gguf, for llama.cpp (extra: gguf)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")


def run(args: argparse.Namespace) -> int:
    quiet()  # before the libraries are imported
    from ..export.huggingface import export as export_folder

    source = chosen_checkpoint(args.run_directory, args.checkpoint)
    shard = int(args.max_shard_gb * 10**9)
    if args.adapter:
        from ..export.peft_adapter import export_adapter

        if args.output is None:
            raise UserError("--adapter: say --output FOLDER; RUN/export is for the whole model")
        if args.merge_onto is not None:
            raise UserError("--merge-onto: is for the whole model; with --adapter nothing is merged")
        if args.gguf is not None:
            raise UserError("--gguf: is for the whole model; leave out --adapter")
        done = export_adapter(source, args.output, args.dtype, args.overwrite, args.device, args.base)
    else:
        where = args.device, args.base, args.merge_onto, args.gguf
        with Bar("export") as bar:
            done = export_folder(source, args.output, args.dtype, args.overwrite, shard, *where, bar)
    dtype = str(done.dtype).removeprefix("torch.")
    what = "the adapter of step" if args.adapter else "step"
    print(f"exported {what} {done.step} as {dtype}, {format_bytes(done.bytes)}: {done.folder}")
    if done.deviation is None:
        print("the checkpoint holds no probe, so the logits were not compared; every tensor was read back and is equal")
    elif done.bound is None:
        print(f"logits differ from training's, on the quantised base, by {done.deviation:.1e} of the largest")
    else:
        print(f"verified: logits within {done.deviation:.1e} of training's, allowed {done.bound:.0e} of the largest")
    if args.gguf is not None:
        print(f"verified: {done.folder}/model-{args.gguf}.gguf reads back by transformers as it was written")
    if done.lost is not None:
        print(f"quantisation took {done.lost:.2%} from the weights it packed (norm of original - dequantized)")
    if "tokenizer.json" not in done.files:
        print("no tokenizer was found for this run, so the folder holds none")
    return 0
