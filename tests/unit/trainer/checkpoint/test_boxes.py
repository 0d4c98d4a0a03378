"""Boxes against NumPy: every element lies where the geometry says, and all ranks together write each once."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeropipe.trainer.checkpoint.boxes import Box, boxes_of_range, flat_index, pieces, strides, written_pieces
from zeropipe.trainer.families.specs import ParamSpec, Split, parameter_table

shapes = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


@given(shapes, st.data())
def test_a_flat_range_is_few_boxes_in_order(shape, data):
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    boxes = boxes_of_range(start, stop, shape)
    elements = np.arange(numel).reshape(shape)
    found = [elements[box.slices].reshape(-1) for box in boxes]
    assert np.concatenate([np.arange(0), *found]).tolist() == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(box.numel == part.size > 0 for box, part in zip(boxes, found, strict=True))


@given(shapes, st.data())
def test_flat_index_and_strides_are_those_of_numpy(shape, data):
    index = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    assert flat_index(index, shape) == (np.ravel_multi_index(index, shape) if shape else 0)
    elements = np.zeros(shape, dtype=np.int8)
    assert all(ours == theirs for ours, theirs, n in zip(strides(shape), elements.strides, shape, strict=True) if n > 1)


@st.composite
def specs(draw) -> ParamSpec:
    """Any parameter: replicated, or split along a dimension in parts and grains, with or without padded rows."""
    shape = list(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    kind = draw(st.sampled_from(["replicated", "vocab", "split"]))
    if kind == "replicated":
        return ParamSpec("p", tuple(shape))
    if kind == "vocab":
        rows = shape[0] + draw(st.integers(0, 6))
        return ParamSpec("p", tuple(shape), "vocab", Split(0), padded_rows=rows)
    dim, grain = draw(st.integers(0, len(shape) - 1)), draw(st.integers(1, 3))
    parts = tuple(grain * n for n in draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    shape[dim] = sum(parts)
    return ParamSpec("p", tuple(shape), "column", Split(dim, parts if len(parts) > 1 else None, grain))


def _local(full: np.ndarray, spec: ParamSpec, rank: int, size: int) -> np.ndarray:
    if spec.dim is None or size == 1:
        return full
    return np.concatenate([full.take(range(a, b), spec.dim) for a, b in spec.ranges(rank, size)], spec.dim)


@given(specs(), st.integers(1, 5), st.data())
def test_pieces_are_where_they_say(spec, size, data):
    rank = data.draw(st.integers(0, size - 1))
    full = np.arange(spec.numel).reshape(spec.padded_shape)
    local = _local(full, spec, rank, size)
    assert local.shape == spec.local_shape(rank, size)
    start = data.draw(st.integers(0, local.size))
    stop = data.draw(st.integers(start, local.size))
    found = []
    for piece in pieces(spec, rank, size, start, stop):
        values = full[piece.box.slices]
        assert np.array_equal(values, local[piece.local.slices])
        found += values.reshape(-1).tolist()
    unpadded = set(full[tuple(slice(0, n) for n in spec.shape)].reshape(-1).tolist())
    assert sorted(found) == sorted(unpadded & set(local.reshape(-1)[start:stop].tolist()))


@settings(max_examples=300)
@given(specs(), st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_all_ranks_together_write_every_element_once(spec, size, data_parallel, partitioned):
    """Whether data-parallel ranks hold flat partitions (ZeRO) or copies."""
    written = np.zeros(spec.shape, dtype=int)
    for rank in range(size):
        numel = math.prod(spec.local_shape(rank, size))
        for replica in range(data_parallel):
            if partitioned:
                start, stop = numel * replica // data_parallel, numel * (replica + 1) // data_parallel
                found = written_pieces(spec, rank, size, start, stop)
            else:
                found = written_pieces(spec, rank, size, 0, numel, replica, data_parallel)
            for piece in found:
                written[piece.box.slices] += 1
    assert (written == 1).all()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_tables_split_and_merge(size):
    """Every parameter of GPT-2 and of a Llama with fewer KV heads than ranks; copies share the writing evenly."""
    gpt2 = {"model_type": "gpt2", "vocab_size": 1001, "n_layer": 1, "n_embd": 32, "n_head": 4, "n_positions": 16}
    llama = {
        "model_type": "llama",
        "vocab_size": 1001,
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 52,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
    }
    for spec in [*parameter_table(gpt2, size), *parameter_table(llama, size)]:
        written = np.zeros(spec.shape, dtype=int)
        amounts = []
        for rank in range(size):
            found = written_pieces(spec, rank, size, 0, math.prod(spec.local_shape(rank, size)))
            for piece in found:
                written[piece.box.slices] += 1
            amounts.append(sum(piece.box.numel for piece in found))
        assert (written == 1).all(), spec.name
        assert spec.kind == "vocab" or max(amounts) - min(amounts) <= 1, spec.name


def test_intersection_and_moving():
    box = Box((2, 3), (4, 5))
    assert box.intersect(Box((0, 0), (3, 4))) == Box((2, 3), (1, 1))
    assert box.intersect(Box((6, 0), (1, 9))) is None
    assert box.moved((2, 0), (0, 10)) == Box((0, 13), (4, 5))
    assert Box((), ()).intersect(Box((), ())) == Box((), ())
