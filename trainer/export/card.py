"""The model card of an export: README.md, whose front matter is the one that Hugging Face's hub reads.

Everything in it follows from the run's files, so that the same run gives the same card; it names no host and no person.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...data_prep.durable import write_durably
from .provenance import CONFIGURATION, PROVENANCE

CARD = "README.md"
_NUMBERS = ("loss", "perplexity", "bits_per_byte")  # of an evaluation, that people compare models by


def write_card(folder: Path, facts: Mapping[str, Any], run: Path | None, adapts: str | None = None) -> None:
    """Writes README.md.

    Args:
        facts: as `provenance` gives them.
        run: the run directory, for its configuration; None: of a checkpoint alone.
        adapts: the base, where the folder holds an adapter for it.
    """
    head = _head(facts) if adapts is None else _adapter_head(facts, Path(adapts).name)
    lines = [*head, *_data(facts), *_training(facts), *_evaluation(facts), *_reproduce(facts, run, adapts is None)]
    body = "\n".join(lines)
    matter = front_matter(facts, _base_card(facts), "transformers" if adapts is None else "peft")
    write_durably(folder / CARD, f"---\n{matter}\n---\n\n{body}\n")


def front_matter(facts: Mapping[str, Any], base: Mapping[str, Any], library: str) -> str:
    """YAML as `huggingface_hub.ModelCardData` writes it.

    Args:
        base: the front matter of the model that the run began from; what it says of licence and language stays.
        library: that loads the folder.
    """
    from huggingface_hub import EvalResult, ModelCardData

    measured = [
        EvalResult(
            task_type="text-generation",
            dataset_type=record["task"] if "task" in record else record["split"],
            dataset_name=record["task"] if "task" in record else f"{record['split']} of {facts['run']}",
            metric_type=name.partition(",")[0],
            metric_value=value,
        )
        for record in facts.get("evaluation", ())
        for name, value in record.items()
        if isinstance(value, float) and (name in _NUMBERS or ("," in name and "_stderr" not in name))
    ]
    kept = {key: base[key] for key in ("license", "license_name", "license_link", "language") if key in base}
    initial = facts.get("initial")
    if initial is not None:
        kept["base_model"] = base.get("base_model") or Path(initial["folder"]).name
    return ModelCardData(
        library_name=library,
        pipeline_tag="text-generation",
        tags=["zeropipe"],
        model_name=facts.get("run", facts["checkpoint"]),
        eval_results=measured or None,
        **kept,
    ).to_yaml()


def _base_card(facts: Mapping[str, Any]) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    initial = facts.get("initial")
    path = None if initial is None else Path(initial["folder"], CARD)
    if path is None or not path.is_file():
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a card without front matter says nothing
        try:
            return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
        except ValueError:  # another's card is no reason to lose an export
            return {}


def _head(facts: Mapping[str, Any]) -> list[str]:
    config = facts["model_config"]
    begun = facts.get("initial")
    what = "trained from random weights" if begun is None else f"trained on from `{Path(begun['folder']).name}`"
    tokens = "" if facts["tokens"] is None else f", {facts['tokens']:,} tokens with a loss"
    return [
        f"# {facts.get('run', facts['checkpoint'])}",
        "",
        f"A `{config['model_type']}` causal language model, {what} with ZeroPipe: step {facts['step']:,}{tokens}.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this-folder")',
        'tokenizer = AutoTokenizer.from_pretrained("this-folder")',
        "```",
        "",
    ]


def _adapter_head(facts: Mapping[str, Any], base: str) -> list[str]:
    tokens = "" if facts["tokens"] is None else f", {facts['tokens']:,} tokens with a loss"
    name, kind = facts.get("run", facts["checkpoint"]), facts["model_config"]["model_type"]
    what = "random weights, which its recipe makes again" if base == "random" else f"`{base}`"
    said = (
        f"An adapter for {what} (`{kind}`), trained with ZeroPipe: step {facts['step']:,}{tokens}. It needs that base."
    )
    if base == "random":
        return [f"# {name}", "", said, ""]
    return [
        f"# {name}",
        "",
        said,
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(base, "this-folder")',
        "```",
        "",
    ]


def _data(facts: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            source["use"],
            f"`{Path(source['store']).name}`",
            f"{source['weight']:g}",
            f"{source['documents']:,}",
            f"{source['tokens']:,}",
            source["license"] or "not stated",
            f"`{source['fingerprint'][:16]}`",
        )
        for source in facts.get("data", ())
    ]
    heading = ("used for", "store", "weight", "documents", "tokens", "licence", "fingerprint")
    return ["## Data", "", *(_table(heading, rows) if rows else ["Not recorded with the checkpoint."]), ""]


def _training(facts: Mapping[str, Any]) -> list[str]:
    environment = facts.get("environment", {})
    rows = [
        ("steps", f"{facts['step']:,}"),
        ("samples", "not recorded" if facts["samples"] is None else f"{facts['samples']:,}"),
        ("tokens with a loss", "not recorded" if facts["tokens"] is None else f"{facts['tokens']:,}"),
        ("ranks", environment.get("ranks") or "not recorded"),
        ("code", environment.get("git") or environment.get("code") or "not recorded"),
        ("Python", environment.get("python", "not recorded")),
        *environment.get("versions", {}).items(),
    ]
    return ["## Training", "", *_table(("", ""), rows), ""]


def _evaluation(facts: Mapping[str, Any]) -> list[str]:
    rows = [
        (record.get("split") or record["task"], f"{record['step']:,}", name, f"{value:.6g}")
        for record in facts.get("evaluation", ())
        for name, value in record.items()
        if isinstance(value, float)
    ]
    if not rows:
        return ["## Evaluation", "", "The run was not evaluated.", ""]
    return ["## Evaluation", "", *_table(("on", "step", "metric", "value"), rows), ""]


def _reproduce(facts: Mapping[str, Any], run: Path | None, whole: bool) -> Iterator[str]:
    """`whole`: of a model, whose folder can be verified."""
    yield "## How to reproduce"
    yield ""
    if run is None:
        yield "The checkpoint was exported without its run."
    files = [] if run is None else [run / name for name in CONFIGURATION]
    for file in filter(Path.is_file, files):
        yield from (f"`{file.name}`:", "", f"```{file.suffix[1:]}", file.read_text("utf-8").rstrip(), "```", "")
    yield "```"
    devices = facts.get("environment", {}).get("ranks", 1) or 1
    yield f"zeropipe launch recipe.yaml --deepspeed_config deepspeed.json --devices {devices}"
    if not whole:
        yield "zeropipe export RUN --adapter --output THIS_FOLDER"
        yield "```"
        return
    yield "zeropipe verify THIS_FOLDER --against RUN --replay 1"
    yield "```"
    yield ""
    yield f"`{PROVENANCE}` holds SHA-256 digests of the data, the tokenizer, the configuration, the checkpoints and all"
    yield "files of this folder; `zeropipe verify` compares them, and takes steps of the run again, bit for bit."


def _table(heading: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (heading, ["---"] * len(heading), *rows)]
