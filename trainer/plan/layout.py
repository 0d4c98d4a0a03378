"""How a run is laid out over its ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Parallel sizes (their product is `world`) and where ZeRO keeps what.

    `expert`: how many of the data x sequence ranks share the experts of each layer; it is no factor of the product.
    """

    world: int
    data: int
    tensor: int = 1
    sequence: int = 1
    pipeline: int = 1
    zero_stage: int = 0
    offload_optimizer: bool = False
    offload_param: bool = False
    expert: int = 1

    def __str__(self) -> str:
        axes = {"data": self.data, "pipeline": self.pipeline, "tensor": self.tensor, "sequence": self.sequence}
        sizes = " x ".join(f"{name} {size}" for name, size in axes.items() if size > 1 or name == "data")
        sizes += f", experts over {self.expert}" if self.expert > 1 else ""
        offload = [name for name, on in (("optimizer", self.offload_optimizer), ("param", self.offload_param)) if on]
        return f"{sizes}, ZeRO-{self.zero_stage}" + (f", {' and '.join(offload)} on CPU" if offload else "")
