"""Files written by streaming against the library's own, byte for byte, and one tensor in memory at a time."""

import weakref

import torch
from safetensors.torch import load_file, save_file

from zeropipe.trainer.checkpoint.safetensors_writer import FileTensor, in_groups, write_safetensors


def test_the_same_bytes_as_the_library(tmp_path):
    torch.manual_seed(0)
    tensors = {"b.weight": torch.randn(3, 5), "a": torch.randn(7), "c.bias": torch.randn(2, 2, 2)}
    for dtype in ("float32", "bfloat16", "float16"):
        cast = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
        save_file(cast, tmp_path / "library.safetensors", {"format": "pt"})
        ours = [FileTensor(n, tuple(tensors[n].shape), dtype, lambda n=n: tensors[n]) for n in sorted(tensors)]
        with (tmp_path / "ours.safetensors").open("wb") as file:
            write_safetensors(file, ours)
        assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()
        loaded = load_file(tmp_path / "ours.safetensors")
        assert all(torch.equal(loaded[name], cast[name]) for name in cast)


def test_one_tensor_in_memory_at_a_time(tmp_path):
    alive: list[weakref.ref] = []

    def read() -> torch.Tensor:
        assert all(earlier() is None for earlier in alive), "an earlier tensor is still held"
        tensor = torch.full((1000,), float(len(alive)))
        alive.append(weakref.ref(tensor))
        return tensor

    with (tmp_path / "x.safetensors").open("wb") as file:
        write_safetensors(file, [FileTensor(str(i), (1000,), "float32", read) for i in range(10)])
    assert len(alive) == 10


def test_groups_keep_the_order_and_the_limit():
    sizes = [10, 10, 100, 5, 5, 5]
    tensors = [FileTensor(str(i), (size,), "float32", lambda: torch.empty(0)) for i, size in enumerate(sizes)]
    groups = in_groups(tensors, limit=80)
    assert [[tensor.key for tensor in group] for group in groups] == [["0", "1"], ["2"], ["3", "4", "5"]]
