"""What DeepSpeed wants to know of parameters that not all replicas hold: the experts of a mixture.

Each ZeRO stage then cuts them over the ranks that hold the same, sums their gradients over those, divides by all
replicas (an expert has seen the tokens of its whole expert group) and counts every expert once in the norm. The names
are DeepSpeed's own, of 0.19: `allreduce` and `group_name` for stages 1 and 2, `ds_zero_…` for stage 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ranks import Ranks

EXPERT_GROUPS = "experts"  # by which name DeepSpeed looks the groups up
MOE_GROUP = {"moe": True, "name": EXPERT_GROUPS}  # of an optimizer's group that holds nothing but such parameters


def mark_expert(parameter: Any, ranks: Ranks) -> None:
    """Tells DeepSpeed which ranks hold a part of a stack of experts, before anything partitions it."""
    if ranks.expert_size == 1:
        return
    from deepspeed.utils import groups

    groups._EXPERT_PARALLEL_GROUP[EXPERT_GROUPS] = ranks.expert_group
    groups._EXPERT_DATA_PARALLEL_GROUP[EXPERT_GROUPS] = ranks.holder_group
    parameter.allreduce, parameter.group_name = False, EXPERT_GROUPS
    parameter.ds_zero_placement_family, parameter.ds_zero_partition_group_name = "autoep_expert", EXPERT_GROUPS
    parameter.ds_zero_partition_process_group = ranks.holder_group
