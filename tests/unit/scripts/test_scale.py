"""What a rank does to set up, save and resume does not grow with the number of ranks."""

import math
import re
from pathlib import Path

import pytest

from scripts.scale import Layout, initial_values, messages, reading, stored_by
from scripts.scale_page import meeting_rows
from zeropipe.trainer.families.specs import parameter_table

SMALL = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
PARAMETERS = sum(math.prod(spec.shape) for spec in parameter_table(SMALL))


def test_messages_of_a_rank_grow_as_the_logarithm_and_its_bytes_not_at_all(tmp_path):
    few, many = (messages(world, tmp_path / str(world)) for world in (4, 32))
    for what, sent in many.items():
        for rank in (1, 31):
            assert sent[rank].messages <= few[what][1].messages * 2.5, what  # log 32 / log 4
            assert sent[rank].nbytes <= few[what][1].nbytes * 1.5 + 500, what
        # rank 0 hears of every file once
        assert sent[0].messages <= sent[1].messages + 2 * 32


@pytest.mark.parametrize(
    "other", [Layout(64), Layout(32), Layout(16, tensor=4), Layout(16, tensor=2, pipeline=2)], ids=str
)
def test_a_rank_looks_at_its_own_part_of_the_index(other, tmp_path):
    stored = stored_by(SMALL, Layout(64), tmp_path)
    for rank in {0, other.world // 2, other.world - 1}:
        found = reading(stored.index, SMALL, other, rank)
        assert found.nbytes <= 12 * PARAMETERS / other.world * 1.1
        assert found.examined <= 3 * found.boxes
        assert found.examined < 3.2 * stored.keys * other.tensor / other.world
    if other == Layout(64):  # a rank's own file, and the neighbours' where they share a row
        assert found.files <= 3
    assert stored.keys >= 64 * 3 * len(parameter_table(SMALL))


def test_initial_values_are_shared_out():
    read, drawn = initial_values(SMALL, Layout(64))
    assert read <= 1.1 * PARAMETERS / 64
    assert drawn == 4096 * 256  # of one module, the largest
    read, drawn = initial_values(SMALL, Layout(16, tensor=4, pipeline=2))
    assert read < 0.6 * PARAMETERS / 4 and drawn < 0.6 * PARAMETERS


def test_every_place_where_ranks_meet_is_in_the_table():
    listed = {where: when for where, when, *_ in meeting_rows()}
    root = Path(__file__).parents[3] / "trainer"
    meets = re.compile(
        r"\bdist(?:ributed)?\.(?:all_\w+|broadcast\w*|gather\w*|scatter\w*|reduce\w*|send|recv|barrier|new_group)\("
        r"|\.(?:together|all_sum|gather_objects|gather_over_stages|gather_on_main|of_main|deal|union|raise_together)\("
    )
    found = {str(path.relative_to(root)) for path in root.rglob("*.py") if meets.search(path.read_text())}
    assert found == set(listed)
    # what every rank tells every other grows with their number: these alone may, and why is in the table
    to_all = {str(path.relative_to(root)) for path in root.rglob("*.py") if ".gather_objects(" in path.read_text()}
    assert to_all == {"engine/replicas.py", "testing/curves.py", "ranks/ranks.py"}
