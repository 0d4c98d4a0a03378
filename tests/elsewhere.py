"""A device that is not there: tensors with a shape, a type and a device, and no values, so that paths of accelerators
can be followed on a machine without one. What mixes them with tensors of the host raises, as it would there; so does
what waits for their values, and a collective of a tensor of the host, as NCCL would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "elsewhere"


_kept: list[torch.library.Library] = []  # what is registered goes with its library


class Elsewhere(TorchDispatchMode):
    """Sends what is made on the device to torch's fake tensors; what is all on the host is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        there = any(isinstance(leaf, torch.device) and leaf.type == NAME for leaf in leaves)
        if there or any(isinstance(leaf, FakeTensor) for leaf in leaves):
            args, kwargs = tree_map_only(torch.Tensor, self._faked, (args, kwargs))
            with self.fake:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _faked(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def the_device() -> torch.device:
    """For the rest of this process; it can be registered once."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME, _Module())
        fallthrough = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")  # autocast's casts are left out
        fallthrough.fallback(torch.library.fallthrough_kernel)
        _kept.append(fallthrough)
    return torch.device(NAME, 0)


@contextlib.contextmanager
def silent_collectives(size: int) -> Iterator[None]:
    """Collectives of groups of `size` ranks that move nothing."""
    import deepspeed.comm
    import torch.distributed as dist

    def there(*tensors: torch.Tensor) -> None:
        assert all(tensor.device.type == NAME for tensor in tensors), "a collective of a tensor of the host"

    def one(tensor: torch.Tensor, *_: Any, **__: Any) -> None:
        there(tensor)

    def many(tensors: list[torch.Tensor], tensor: torch.Tensor, *_: Any, **__: Any) -> None:
        there(tensor, *tensors)

    def single(output: torch.Tensor, tensor: torch.Tensor, *_: Any, **__: Any) -> None:
        there(output, tensor)

    stand_ins = {
        "all_reduce": one,
        "all_gather": many,
        "all_to_all_single": single,
        "get_world_size": lambda *_, **__: size,
        "get_rank": lambda *_, **__: 0,
    }
    with contextlib.ExitStack() as stack:
        from unittest.mock import patch

        for module in (dist, deepspeed.comm):
            for name, stand_in in stand_ins.items():
                stack.enter_context(patch.object(module, name, stand_in))
        yield
