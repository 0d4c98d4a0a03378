"""Where an exported model comes from, in digests, and whether that is still so.

`provenance.json` holds digests of everything that a model follows from (configuration, data, tokenizer, checkpoints,
record), of every file of the folder that it lies in, and of itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...data_prep.durable import write_durably
from ...data_prep.errors import UserError
from ...data_prep.manifest import STORE_MANIFEST, file_record
from ...data_prep.store import TokenStore
from ..checkpoint.files import MANIFEST
from ..checkpoint.folder import CHECKPOINTS, step_folders
from ..checkpoint.reader import Checkpoint
from ..metrics.reading import read_metrics
from ..recipe.recipe import Recipe
from ..recipe.sources import WeightedStore
from ..run.directory import is_hf_folder, load_run_recipe, tokenizer_files, tokenizer_folder
from ..sinks.jsonl import METRICS

PROVENANCE = "provenance.json"
CONFIGURATION = ("recipe.yaml", "deepspeed.json")
_FORMAT, _VERSION = "zeropipe provenance", 1
_ENVIRONMENT = ("python", "platform", "versions", "git", "code")  # of the record of a run; no names of hosts or people
_OF_A_STEP = ("step", "loss", "lr", "grad_norm", "samples", "ledger")  # of the record: what a replay gives again


def provenance(checkpoint: Checkpoint, run: Path | None) -> dict[str, Any]:
    """What a checkpoint follows from, as plain JSON. Of a store that has a manifest nothing is read but that.

    Args:
        run: the run directory that the checkpoint lies in; None: then there is little to tell.

    Raises:
        UserError: the run's files or data cannot be read.
    """
    state = checkpoint.state
    facts: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        "checkpoint": checkpoint.path.name,
        "step": checkpoint.step,
        "samples": state.get("samples_consumed"),
        "tokens": state.get("tokens_consumed"),
        "model_config": state["model_config"],
        "checkpoints": {checkpoint.path.name: _digest_of(checkpoint.path / MANIFEST)},
    }
    if run is None:
        return facts
    recipe, tokenizer = load_run_recipe(run), tokenizer_folder(checkpoint.path)
    return facts | {
        "run": recipe.name,
        "environment": _environment(run),
        "configuration": {name: _digest_of(run / name) for name in CONFIGURATION if (run / name).is_file()},
        "data": [_data(use, source) for use, source in sources_of(recipe)],
        "tokenizer": _tokenizer(tokenizer),
        "initial": _initial(recipe),
        "checkpoints": {path.name: _digest_of(path / MANIFEST) for path in _before(run, checkpoint.step)},
        "record": _record(run, checkpoint.step),
        "evaluation": evaluated_until(run, checkpoint.step),
    }


def sources_of(recipe: Recipe) -> list[tuple[str, WeightedStore]]:
    """The stores of a run, with what each is for: train, valid, test, or the name of a further set."""
    data = recipe.data
    uses = {"train": data.train, "valid": data.valid or [], "test": data.test or [], **recipe.eval.sets}
    return [(use, source) for use, sources in uses.items() for source in sources]


def evaluated_until(run: Path, step: int) -> list[dict[str, Any]]:
    """The newest evaluation of each set and at each task until `step`, as the record has it."""
    newest = {record.get("split") or record["task"]: record for record in _evaluations(run, step)}
    return list(newest.values())


def _evaluations(run: Path, step: int) -> list[dict[str, Any]]:
    if not (run / METRICS).exists():
        return []
    told = (r for r in read_metrics(run) if r["kind"] in ("eval", "task") and r["step"] <= step)
    return [{key: value for key, value in record.items() if key not in ("run", "time")} for record in told]


def write_provenance(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes the manifest into a folder whose other files are all there."""
    write_durably(folder / PROVENANCE, _text({**facts, "files": folder_digests(folder)}))


def read_provenance(folder: Path) -> dict[str, Any]:
    """The manifest of an exported folder.

    Raises:
        UserError: there is none, it was changed, or another version wrote it.
    """
    path = folder / PROVENANCE
    try:
        text = path.read_text("utf-8")
        facts = json.loads(text)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; `zeropipe export` writes it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read, it is damaged ({error})") from None
    if not isinstance(facts, dict) or facts.pop("self", None) is None or text != _text(facts):
        raise UserError(f"{path}: is not as it was written: it does not match its own digest")
    if (facts["format"], facts["version"]) != (_FORMAT, _VERSION):
        raise UserError(f"{path}: {facts['format']} {facts['version']}; this program reads {_FORMAT} {_VERSION}")
    return facts


def folder_problems(folder: Path, facts: Mapping[str, Any]) -> list[str]:
    """What of an exported folder is not as it was written; reads it all."""
    return list(_differences(f"{folder}/", facts["files"], folder_digests(folder)))


def run_problems(run: Path, facts: Mapping[str, Any]) -> list[str]:
    """What of a run is not as it was when the model was exported: every byte of its data is read.

    Checkpoints that are gone (`save.keep` removes them) are no problem, but for the one that was exported.
    """
    if "run" not in facts:
        return [f"{PROVENANCE}: the checkpoint was exported without its run, so there is nothing to compare with"]
    recipe, step = load_run_recipe(run), facts["step"]
    now = {name: _digest_of(run / name) for name in CONFIGURATION if (run / name).is_file()}
    problems = list(_differences(f"{run}/", facts["configuration"], now))
    found = sources_of(recipe)
    if len(found) != len(facts["data"]):
        return [*problems, f"{run}: the recipe names {len(found)} stores, the model was made from {len(facts['data'])}"]
    for (_, source), recorded in zip(found, facts["data"], strict=True):
        problems += _store_problems(Path(source.store), recorded)
    tokenizer = tokenizer_folder(run)
    problems += _differences(f"{tokenizer}/", facts["tokenizer"], _tokenizer(tokenizer))
    if (initial := facts["initial"]) is not None:
        files = folder_digests(Path(recipe.model.init)) if is_hf_folder(Path(recipe.model.init)) else {}
        problems += _differences(f"{recipe.model.init}/", initial["files"], files)
    for name, digest in facts["checkpoints"].items():
        path = run / CHECKPOINTS / name / MANIFEST
        if path.is_file() or name == facts["checkpoint"]:
            problems += _differences("", {str(path): digest}, {str(path): _digest_of(path)} if path.exists() else {})
    if _record(run, step) != facts["record"]:
        problems.append(f"{run / METRICS}: its steps until {step} are not those that the model was exported with")
    known = _evaluations(run, step)
    if not all(record in known for record in facts["evaluation"]):
        problems.append(f"{run / METRICS}: its evaluations until step {step} are not those of the model's card")
    return problems


def folder_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder and those in it, by its path from there, but of the manifest of this room."""
    if not folder.is_dir():
        return {}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {name: _digest_of(path) for path in files if (name := path.relative_to(folder).as_posix()) != PROVENANCE}


def _store_problems(path: Path, recorded: Mapping[str, Any]) -> Iterator[str]:
    try:
        now = {name: _digest_of(_beside(path, name)) for name in recorded["files"]}
    except OSError as error:
        yield f"{error.filename}: {error.strerror}"
        return
    yield from _differences(f"{path}: ", recorded["files"], now)


def _data(use: str, source: WeightedStore) -> dict[str, Any]:
    store = TokenStore.open(source.store)
    if store.manifest is None:
        files = {path.name: file_record(path) for shard in store.shards for path in (shard.bin, shard.idx)}
    else:
        files = {name: record for shard in store.manifest.shards for name, record in shard.files().items()}
        files |= {f"tokenizer/{name}": record for name, record in store.manifest.tokenizer.items()}
        files[STORE_MANIFEST] = file_record(store.path / STORE_MANIFEST)
    return {
        "use": use,
        "store": source.store,
        "weight": source.weight,
        "license": source.license,
        "fingerprint": store.fingerprint,
        "documents": store.num_documents,
        "tokens": store.num_tokens,
        "files": {name: record.sha256 for name, record in files.items()},
    }


def _beside(store: Path, name: str) -> Path:
    """A file of a store directory, or of a bare prefix."""
    return (store if store.is_dir() else store.parent) / name


def _initial(recipe: Recipe) -> dict[str, Any] | None:
    """The Hugging Face folder that a run began from; what other runs gave is told by their own checkpoints."""
    folder = Path(recipe.model.init)
    return {"folder": recipe.model.init, "files": folder_digests(folder)} if is_hf_folder(folder) else None


def _tokenizer(folder: Path | None) -> dict[str, str]:
    return {} if folder is None else {path.name: _digest_of(path) for path in tokenizer_files(folder)}


def _environment(run: Path) -> dict[str, Any]:
    try:
        found = json.loads((run / "environment.json").read_text())
    except (OSError, ValueError):  # copied without it
        return {}
    return {key: found[key] for key in _ENVIRONMENT if key in found} | {"ranks": len(found.get("hosts", ()))}


def _before(run: Path, step: int) -> list[Path]:
    found = [path for path in step_folders(run) if (path / MANIFEST).is_file()]
    return sorted(path for path in found if int(path.name.partition("-")[2]) <= step)


def _record(run: Path, step: int) -> str | None:
    """Digest of what the run's record says of its steps, without times."""
    if not (run / METRICS).exists():
        return None
    steps = [
        [r.get(key) for key in _OF_A_STEP] for r in read_metrics(run) if r["kind"] == "train" and r["step"] <= step
    ]
    return hashlib.sha256(json.dumps(steps).encode()).hexdigest()


def _differences(where: str, recorded: Mapping[str, str], found: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*recorded, *found}):
        if name not in found:
            yield f"{where}{name}: missing"
        elif name not in recorded:
            yield f"{where}{name}: was not there when the model was exported"
        elif recorded[name] != found[name]:
            yield f"{where}{name}: SHA-256 is {found[name]}, the export had {recorded[name]}"


def _digest_of(path: Path) -> str:
    return file_record(path).sha256


def _text(facts: Mapping[str, Any]) -> str:
    """As it is written: with a digest of itself, and of one form only, so that no byte can change unseen."""
    own = {key: value for key, value in facts.items() if key != "self"}
    plain = json.dumps(own, sort_keys=True, ensure_ascii=False)
    body = {**own, "self": hashlib.sha256(plain.encode()).hexdigest()}
    return json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
