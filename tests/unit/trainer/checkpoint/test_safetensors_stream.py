"""Files written by streaming against the library's own, byte for byte, and one tensor in memory at a time."""

import weakref

import torch
from safetensors.torch import load_file, save_file

from zeropipe.trainer.checkpoint.safetensors_format import groups
from zeropipe.trainer.checkpoint.safetensors_stream import Entry, write_tensors


def test_the_same_bytes_as_the_library(tmp_path):
    torch.manual_seed(0)
    tensors = {"b.weight": torch.randn(3, 5), "a": torch.randn(7), "c.bias": torch.randn(2, 2, 2)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        save_file(cast, tmp_path / "library.safetensors", {"format": "pt"})
        entries = [Entry(name, tuple(tensors[name].shape), dtype) for name in sorted(tensors)]
        write_tensors(tmp_path / "ours.safetensors", entries, tensors.__getitem__)
        assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()
        loaded = load_file(tmp_path / "ours.safetensors")
        assert all(torch.equal(loaded[name], cast[name]) for name in cast)


def test_one_tensor_in_memory_at_a_time(tmp_path):
    alive: list[weakref.ref] = []

    def read(name: str) -> torch.Tensor:
        assert all(earlier() is None for earlier in alive[:-1]), "an earlier tensor is still held"
        tensor = torch.full((1000,), float(len(alive)))
        alive.append(weakref.ref(tensor))
        return tensor

    write_tensors(tmp_path / "x.safetensors", [Entry(str(i), (1000,), torch.float32) for i in range(10)], read)
    assert len(alive) == 10


def test_shards_keep_the_order_and_the_limit():
    entries = [Entry(str(i), (size,), torch.float32) for i, size in enumerate([10, 10, 100, 5, 5, 5])]
    files = groups(entries, limit=80)
    assert [[entry.name for entry in group] for group in files] == [["0", "1"], ["2"], ["3", "4", "5"]]
