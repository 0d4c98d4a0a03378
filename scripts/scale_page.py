"""Writes the counts of `scale.py` as a page, beside a table of every collective of the trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from scripts.simulated_ranks import Sent

HEAD = """# What a rank costs in a large world

Written by `python -m scripts.scale docs/scale.md`, nothing by hand. Two kinds of counts, none of them a time: what the
product's functions do for a rank's share of Llama 70B's table of parameters ({parameters:,} values, no weights), and
the messages of simulated ranks, a thread each, that run the product's own functions on a small model. Reductions and
broadcasts are counted along binary trees; of the tables' figures each is the most that any rank has.
"""


TAIL = """N ranks. What is gathered on rank 0 comes there as one message from each rank. Whatever fails is told to all
ranks in words, once: N - 1 messages. DeepSpeed's own collectives are not counted.
"""
VALUES = """Of replicas that hold a parameter whole the first reads or draws. On ZeRO-3 every rank reads its part; one
rank draws a parameter, and sends the others their parts. Every tensor rank draws what it cuts. A run that resumes reads
and draws nothing, but the base of an adapter and what preferences are compared with. An adapter that `model.init` folds
into its base, and linears that qlora packs, are made whole on every rank.
"""
VERIFY = """Rank 0 alone reads the manifest and looks at the size of every file, and deals the digests out.
"""
INDEX = """Before, every rank read the headers of all files. Checkpoints that have no index are still read so.
"""
SAVE = """Where the boxes are is told when it changes: once in a run. Later a rank tells its files' sizes and digests.
"""
MEMORY = """Measured: a rank's own memory over what it had before, ZeRO-3 in fp32, from a folder of 167 million
parameters, of which the largest takes 66 MB. Building the model takes the share and one parameter. The engine adds
gradients and masters, a share each.
"""
MESSAGES = """Of one small parameter, ZeRO-0: messages tell of boxes, not of values.
Rank 0 hears from every rank where it gathers or deals.
"""
# every file of trainer/ where ranks meet; a test holds it against the source. When, what, messages of a rank, of rank 0
MEETINGS = """
commands/train.py | set-up | whether the recipe could be read, the plan made | 2 log N |
run/data.py | set-up | whether the data could be opened | 2 log N |
run/guard.py | set-up, end | whether the directory is free; why a run stops | 2 log N |
metrics/record.py | set-up | hosts, 150 bytes each, to rank 0; whether the record could be begun | 2 log N + 1 | N
engine/build.py | set-up | whether there is a compiler | 2 log N |
adapters/merged.py | set-up | whether `model.init` could be opened | 2 log N |
adapters/bases.py | set-up, adapters | digests of files that a rank read, to rank 0; all, back | 4 log N + 1 | N
modeling/build.py | set-up | ZeRO-3, drawn: this rank's part of every parameter | 1 each, N - 1 where it draws |
modeling/layer_costs.py | set-up | `partition: measured`: seconds of a layer of each kind | 2 log N |
evaluation/evaluator.py | set-up, evaluation | whether tokenizer and batches could be read | 2 log N |
evaluation/answers.py | set-up | whether the prompts could be read | 2 log N |
evaluation/task_rounds.py | evaluation | ids of every request, from rank 0; whether tasks could be read | 2 log N |
engine/reference.py | set-up, dpo | 12 bytes of every text that this rank reads, to rank 0 | 8 log N + 1 | N
checkpoint/loader.py | resume | from rank 0 the newest, this rank's digests; whether all is right | 14 log N + 1 | N
checkpoint/deepspeed_state.py | resume | ZeRO-3: what stays whole, from its parts | N - 1 |
engine/checkpoints.py | resume, save | samples left out, from rank 0; whether the directory is still ours | 2 log N |
checkpoint/snapshot.py | save, resume | names of parameters, from the other stages | stages - 1 |
checkpoint/writer.py | save | digests, once also places of boxes, to rank 0; which are to go | 18 log N + 1 | N
engine/base.py | step, evaluation | a sum of ten numbers | 2 log N |
engine/pace.py | step, at `log.every` | 32 bytes, to rank 0 | 1 | N
engine/coming.py | step that fails | why a rank cannot read its data | N - 1 |
engine/replicas.py | each `check_replicas` steps | largest and smallest checksum; once, names from rank 0 | 2 log N |
engine/zero.py | step | ZeRO-0 with tensor ranks: the gradient's norm | 2 log tensor |
engine/pipeline.py | save, evaluation | activations from stage to stage, logits back | 2 + log stages |
modeling/tensor_parallel.py | step | activations, over tensor ranks | 2 log tensor a layer |
modeling/derived/words.py | step | the same in derived families; columns, where a layer is cut so | tensor - 1 a layer |
modeling/cross_entropy.py | step | sums over tensor ranks | 2 log tensor |
modeling/mixtures/routers.py | step | sums of each sequence's routing, over sequence ranks | 2 log sequence a layer |
modeling/sequence_parallel.py | step | heads for tokens, over sequence ranks | sequence - 1 a layer |
modeling/mixtures/dispatch.py | step | tokens to experts and back, 5 times forward, 3 back | 8 (expert - 1) a layer |
testing/curves.py | parity alone | weights, to compare | N - 1 |
tune/machine.py | tune alone | a sum that is timed | 2 log N |
ranks/ranks.py | | what all of these are made of | 0 |
ranks/grid.py | set-up | torch's groups: every rank makes all, members connect | 0 |
"""


def page(parameters: int, sections: Mapping[str, str]) -> str:
    head = "where (trainer/)", "when", "what", "messages of a rank", "of rank 0"
    meetings = _table(head, [(f"`{where}`", *rest) for where, *rest in meeting_rows()])
    return "\n".join(
        [
            HEAD.format(parameters=parameters),
            *(f"## {title}\n\n{text}" for title, text in sections.items()),
            f"## Where ranks meet\n\n{TAIL}\n{meetings}",
        ]
    )


def meeting_rows() -> list[list[str]]:
    """The cells of `MEETINGS`."""
    return [[cell.strip() for cell in line.split("|")] for line in MEETINGS.strip().splitlines()]


def values_section(rows: Iterable[tuple[str, int, int]], parameters: int) -> str:
    head = "layout", "values read (folder, run)", "values drawn (random)", "before, either"
    cells = [(layout, _count(read), _count(drawn), _count(parameters)) for layout, read, drawn in rows]
    return f"{_table(head, cells)}\n{VALUES}"


def verify_section(rows: Iterable[tuple[int, int, int]], whole: int) -> str:
    head = "ranks", "bytes read", "files looked at", "before: bytes (`model.init`)", "before: files looked at"
    cells = [
        (f"{world:,}", size_text(share), f"{files}", size_text(whole), f"{world:,}") for world, share, files in rows
    ]
    return f"{_table(head, cells)}\n{VERIFY}"


def index_section(rows: Iterable[Sequence[str]]) -> str:
    head = "saved by", "read by", "own bytes", "entries looked at", "boxes read", "files opened"
    return f"{_table((*head, 'before: entries, files'), rows)}\n{INDEX}"


def save_section(rows: Iterable[Sequence[str]]) -> str:
    return f"{_table(('layout', 'bytes written', 'told to rank 0 the first time', 'index'), rows)}\n{SAVE}"


def messages_section(found: Mapping[int, Mapping[str, Sequence[Sent]]]) -> str:
    worlds = sorted(found)
    rows = []
    for what in found[worlds[0]]:
        cells = [what]
        for world in worlds:
            rank0, *others = found[world][what]
            most = max(sent.messages for sent in others), size_text(max(sent.nbytes for sent in others))
            cells += [f"{most[0]}, {most[1]}", f"{rank0.messages:,}, {size_text(rank0.nbytes)}"]
        rows.append(cells)
    heads = [head for world in worlds for head in (f"a rank of {world:,}", "rank 0")]
    return f"{_table(('messages, bytes', *heads), rows)}\n{MESSAGES}"


def memory_section(found: Mapping[int, Sequence[int]]) -> str:
    head = "ranks", "own share in fp32", "at most, model built", "at most, engine built"
    return f"{_table(head, [(str(world), *map(size_text, most)) for world, most in found.items()])}\n{MEMORY}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def _count(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def size_text(nbytes: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000  # type: ignore[assignment]
    return f"{nbytes:.3g} TB"
