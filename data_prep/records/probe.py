"""Before the work: what kind of records these are, and whether what is learnt ends in what generation stops at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..corpus.documents import read_records
from ..corpus.slices import BadDocument
from ..corpus.sources import Task
from ..errors import UserError
from ..making.tasks import Job
from ..store import TRAINED
from .drafts import Drafter
from .flags import Flagger
from .formats import Sample, recognise
from .settings import BadRecord
from .spans import ReferenceSpans, recognising_tokenizer, special_tokens
from .template import ChatTemplate
from .vocabulary import GENERATION_CONFIG, require_eos

QUESTION = {"role": "user", "content": "Is it so?"}
ANSWER = {"role": "assistant", "content": "Yes."}


def first_sample(tasks: Sequence[Task], kind: str, on_error: str) -> Sample | None:
    """The first record that is one, in the order of the input; None if there is none."""

    def bad(problem: BadDocument) -> None:
        if on_error == "stop":
            raise problem

    for part in (part for task in tasks for part in task.slices):
        for place, record in read_records(part, bad):
            try:
                return recognise(record, kind)
            except BadRecord as error:
                bad(place.bad(str(error)))
    return None


def require_stop(job: Job, template: ChatTemplate) -> None:
    """UserError unless an answer that is learnt ends with a token at which generation stops.

    What is looked at is what the records will be: a question and its answer, by the same template and rules.
    """
    folder = Path(job.tokenizer)
    tokenizer = recognising_tokenizer(folder)
    eos, _ = require_eos(folder, tokenizer)
    records = job.records
    assert records is not None
    prompted = Sample("probe", [[ANSWER]], [QUESTION])
    whole = Sample("probe", [[QUESTION, ANSWER]])
    drafter = Drafter(records, eos, special_tokens(tokenizer), lambda: template)
    try:
        drafts = drafter.drafts(prompted if records.kind == "dpo" else whole)
    except BadRecord as error:
        raise UserError(f"{folder}: on a question and its answer: {error}") from None
    texts = [ReferenceSpans(tokenizer).encode(draft.texts) for draft in drafts]
    (row,) = Flagger(job, folder, tokenizer).rows(drafts, texts, Counter())
    learnt = row["token"][(row["flags"] & TRAINED) != 0].tolist()
    if not set(learnt) & set(records.stops):
        names = [tokenizer.id_to_token(number) for number in learnt]
        end = next((name for name in reversed(names) if name in drafter.special), None)
        stops = ", ".join(repr(tokenizer.id_to_token(number)) for number in records.stops)
        remedy = f"Give a template that ends answers with {stops} (--chat-template)"
        if end is not None:
            remedy += f", or name {end!r} as eos_token_id in {GENERATION_CONFIG} beside the tokenizer"
        raise UserError(
            f"the chat template ends an answer with {'no special token' if end is None else repr(end)}, but generation "
            f"stops at {stops}, which would not be learnt: the model would not stop. {remedy}"
        )
