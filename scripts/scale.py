"""Counts what set-up, saving and resuming cost each rank of a large world, and writes docs/scale.md.

usage: python -m scripts.scale FILE. Two kinds of counts: the functions' own work for a rank's share of a
table of 70 billion parameters (boxes, bytes, files; no weights), and the messages that simulated ranks, a thread each,
exchange while they run the product's own functions. Beside them the host memory of two and four real
ranks is measured. Nothing is timed.
"""

from __future__ import annotations

import argparse
import math
import pickle
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.scale_page import (
    index_section,
    memory_section,
    messages_section,
    page,
    save_section,
    size_text,
    values_section,
    verify_section,
)
from scripts.simulated_ranks import Sent, SimulatedRanks, on_simulated_ranks
from tests.distributed.init_memory import begun
from tests.distributed.torch_engine import GPT2, PlainEngine
from zeropipe.trainer.checkpoint import reader
from zeropipe.trainer.checkpoint.boxes import pieces
from zeropipe.trainer.checkpoint.deepspeed_state import Live
from zeropipe.trainer.checkpoint.files import CheckpointManifest, Digest, box_tensor
from zeropipe.trainer.checkpoint.index import INDEX, BoxIndex, rows_of_rank
from zeropipe.trainer.checkpoint.loader import load, newest_shared
from zeropipe.trainer.checkpoint.safetensors_writer import FileTensor
from zeropipe.trainer.checkpoint.sharing import reading_shares
from zeropipe.trainer.checkpoint.writer import SnapshotWriter
from zeropipe.trainer.families.specs import ParamSpec, parameter_table
from zeropipe.trainer.modeling.values import Cut, RandomValues, dealt
from zeropipe.trainer.ranks.ranks import Ranks

LLAMA_70B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Held:
    """A flat range of a rank's tensor-parallel tensor."""

    spec: ParamSpec
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """ZeRO-3 over all ranks, or ZeRO-1 over what tensor and pipeline parallelism leave."""

    world: int
    tensor: int = 1
    pipeline: int = 1

    @property
    def data(self) -> int:
        return self.world // (self.tensor * self.pipeline)

    @property
    def cuts_parameters(self) -> bool:
        return self.tensor == self.pipeline == 1

    def __str__(self) -> str:
        if self.cuts_parameters:
            return f"ZeRO-3 over {self.world:,}"
        return f"ZeRO-1, pipeline {self.pipeline} x data {self.data} x tensor {self.tensor}"

    def stage_table(self, config: Mapping[str, Any], rank: int) -> list[ParamSpec]:
        """The parameters of a rank's stage: equal runs of blocks, what stands before and after them at the ends."""
        stage, blocks = rank // (self.tensor * self.data), config["num_hidden_layers"]

        def of(spec: ParamSpec) -> int:
            if spec.layer is not None:
                return spec.layer * self.pipeline // blocks
            return 0 if "embed" in spec.name else self.pipeline - 1

        return [spec for spec in parameter_table(config, self.tensor) if of(spec) == stage]

    def held(self, config: Mapping[str, Any], rank: int) -> list[Held]:
        """What a rank has of every parameter."""
        data, table = rank // self.tensor % self.data, self.stage_table(config, rank)
        sizes = [math.prod(spec.local_shape(rank % self.tensor, self.tensor)) for spec in table]
        found, begin, of_all = [], 0, -(-sum(sizes) // self.data)
        for spec, size in zip(table, sizes, strict=True):
            # every parameter into equal ranges; or one after the other, and that into equal ranges
            share, before = (-(-size // self.data), 0) if self.cuts_parameters else (of_all, begin)
            first, last = (min(max(edge * share - before, 0), size) for edge in (data, data + 1))
            begin += size
            if last > first:
                found.append(Held(spec, first, last))
        return found


def boxes_written(config: Mapping[str, Any], layout: Layout, rank: int) -> tuple[list[FileTensor], dict[str, Any]]:
    """The boxes of a rank's files, and the shapes beside them."""
    found, held = [], layout.held(config, rank)
    for own in held:
        for piece in pieces(own.spec, rank % layout.tensor, layout.tensor, own.start, own.stop):
            found += [box_tensor(kind, own.spec.name, piece.box, _no_values) for kind in KINDS]
    return found, {own.spec.name: own.spec.shape for own in held}


def _no_values() -> Any:
    raise AssertionError("nothing is written")


@dataclass(frozen=True)
class Reading:
    """What a rank does to find and read its share of a checkpoint."""

    nbytes: int  # of its share
    examined: int  # entries of the index that it looks at
    boxes: int  # that it reads
    files: int  # that it opens


def reading(index: BoxIndex, config: Mapping[str, Any], layout: Layout, rank: int) -> Reading:
    """Counts with the product's own index."""
    nbytes, examined, boxes, files = 0, 0, 0, set[str]()
    for own in layout.held(config, rank):
        for piece in pieces(own.spec, rank % layout.tensor, layout.tensor, own.start, own.stop):
            for kind in KINDS:
                nbytes += 4 * piece.box.numel
                for stored in index.spots(own.spec.name, kind, piece.box):
                    examined += 1
                    if stored.box.intersect(piece.box) is not None:
                        boxes += 1
                        files.add(stored.file)
    return Reading(nbytes, examined, boxes, len(files))


@dataclass(frozen=True)
class Stored:
    """A checkpoint of a layout: its index, and what its ranks tell of it."""

    index: BoxIndex
    keys: int  # boxes of all files
    told: int  # bytes of the most that a rank tells of where its boxes are
    share: int  # bytes of the most that a rank writes
    index_bytes: int


def stored_by(config: Mapping[str, Any], layout: Layout, folder: Path) -> Stored:
    """Writes the index that the ranks of a layout would write, and opens it."""
    ranks, keys, told, share = [], 0, 0, 0
    for rank in range(layout.world):
        tensors, shapes = boxes_written(config, layout, rank)
        ranks.append(rows_of_rank(rank, tensors, shapes))
        keys, share = keys + len(tensors), max(share, sum(tensor.nbytes for tensor in tensors))
        told = max(told, len(pickle.dumps(ranks[-1])))
    BoxIndex.of(ranks).write(folder / INDEX)
    return Stored(BoxIndex.open(folder, list), keys, told, share, (folder / INDEX).stat().st_size)


def initial_values(config: Mapping[str, Any], layout: Layout) -> tuple[int, int]:
    """The most values that a rank reads and draws."""
    table = parameter_table(config)
    if layout.cuts_parameters:
        read = [sum(b - a for spec in table for a, b in Cut(_rank(n, layout), 1).ranges(spec)) for n in (0, 1)]
        turns, drawn = dealt(table, RandomValues(0).unit, layout.world), [0] * layout.world
        for spec in table:
            drawn[turns[spec.name]] += math.prod(spec.shape)
        return max(read), max(drawn)
    firsts = [stage * layout.tensor * layout.data for stage in range(layout.pipeline)]  # the others fill nothing
    tables = [layout.stage_table(config, rank) for rank in firsts]
    read = [sum(math.prod(spec.local_shape(0, layout.tensor)) for spec in own) for own in tables]
    return max(read), max(sum(math.prod(spec.shape) for spec in own) for own in tables)


def _rank(number: int, layout: Layout) -> Ranks:
    return Ranks(rank=number, world=layout.world, data=number, data_size=layout.world)


def messages(world: int, folder: Path) -> dict[str, list[Sent]]:
    """What each of `world` simulated ranks sends to save (the first time and again), to find and verify, to load."""
    table = [
        min(parameter_table(GPT2), key=lambda spec: math.prod(spec.shape))
    ]  # messages tell of boxes, not their values

    def work(ranks: SimulatedRanks) -> dict[str, Sent]:
        engine, found = PlainEngine(ranks, table, 1), {}
        live, writer = Live(engine, engine.parameters, ranks), SnapshotWriter(folder, 1, 2, 9, background=False)
        for step, what in ((1, "first save"), (2, "save"), (3, "save that removes an older one")):
            before = ranks.sent.copy()
            writer.save(live, {"step": step})
            writer.wait()
            found[what] = ranks.sent.since(before)
        before = ranks.sent.copy()
        checkpoint = newest_shared(folder, ranks, "resume: ")
        found["find and verify"] = ranks.sent.since(before)
        before = ranks.sent.copy()
        load(live, checkpoint)
        found["load"] = ranks.sent.since(before)
        return found

    found = [sent for sent, _ in on_simulated_ranks(world, work)]
    return {what: [of_rank[what] for of_rank in found] for what in found[0]}


def share_to_verify(world: int, config: Mapping[str, Any], folder: Path) -> tuple[int, int, int]:
    """The most bytes and files that a rank verifies of a ZeRO-3 checkpoint of `world` ranks; all bytes."""
    layout = Layout(world)
    sizes = {f"rank-{n:05d}.safetensors": _written_bytes(config, layout, n) for n in range(world)}
    folder.mkdir()
    for name, size in sizes.items():
        with (folder / name).open("wb") as file:
            file.truncate(size)  # holes
    CheckpointManifest(1, 1, {name: Digest(size, "") for name, size in sizes.items()}).write(folder)
    dealt = [own.files.values() for own in reading_shares(folder, world)]
    return max(sum(file.size for file in own) for own in dealt), max(map(len, dealt)), sum(sizes.values())


def _written_bytes(config: Mapping[str, Any], layout: Layout, rank: int) -> int:
    return sum(4 * len(KINDS) * (own.stop - own.start) for own in layout.held(config, rank))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--ranks", type=int, default=1024, help="of the 70-billion-parameter model")
    parser.add_argument("--simulated", type=int, nargs="+", default=[64, 256, 1024], help="worlds of threads")
    arguments = parser.parse_args(argv)
    config, worlds, ranks = LLAMA_70B, arguments.simulated, arguments.ranks
    layouts = Layout(ranks), Layout(ranks, tensor=8, pipeline=8)
    parameters = sum(math.prod(spec.shape) for spec in parameter_table(config))
    reader._OPEN_FILES = 4  # of every rank; here they are all in one process
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        told = {world: messages(world, folder / f"world-{world}") for world in worlds}
        memory = {world: [max(own) for own in zip(*begun(world, folder), strict=True)] for world in (2, 4)}
        shares = [(world, *share_to_verify(world, config, folder / f"files-{world}")) for world in (ranks // 8, ranks)]
        readings, saves = [], []
        for saved in layouts:
            stored = stored_by(config, saved, folder)
            saves.append((str(saved), size_text(stored.share), size_text(stored.told), size_text(stored.index_bytes)))
            for other in (*layouts, Layout(ranks // 2)):
                places = {0, 1, other.world // 2, other.world - 1}
                found = [reading(stored.index, config, other, rank) for rank in places]
                most = max(found, key=lambda of_rank: of_rank.boxes)
                counts = f"{most.examined:,}", f"{most.boxes:,}", f"{most.files:,}", f"{stored.keys:,}, {saved.world:,}"
                readings.append((str(saved), str(other), size_text(most.nbytes), *counts))
    sections = {
        "Initial values": values_section([(str(own), *initial_values(config, own)) for own in layouts], parameters),
        "Host memory from a folder": memory_section(memory),
        "Finding and verifying a checkpoint": verify_section([row[:3] for row in shares], shares[-1][3]),
        "Loading it": index_section(readings),
        "Saving it": save_section(saves),
        "Messages": messages_section(told),
    }
    arguments.page.write_text(page(parameters, sections), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
