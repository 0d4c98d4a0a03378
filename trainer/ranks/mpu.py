"""What DeepSpeed wants to know about the layout (`mpu` of `deepspeed.initialize`), answered from Ranks."""

from __future__ import annotations

from torch.distributed import ProcessGroup

from .ranks import Ranks


class Mpu:
    """Model parallelism without a pipeline.

    Sequence-parallel ranks count as data-parallel ones: they hold the same weights and different tokens, and every rank
    divides its loss by the tokens of the whole batch, so that sums of gradients are all that is needed. DeepSpeed's own
    sequence groups scale gradients differently on each ZeRO stage.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def get_model_parallel_rank(self) -> int:
        return self.ranks.tensor

    def get_model_parallel_world_size(self) -> int:
        return self.ranks.tensor_size

    def get_model_parallel_group(self) -> ProcessGroup | None:
        return self.ranks.tensor_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self.ranks.replica

    def get_data_parallel_world_size(self) -> int:
        return self.ranks.replicas

    def get_data_parallel_group(self) -> ProcessGroup | None:
        return self.ranks.replica_group
