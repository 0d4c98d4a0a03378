"""The keys that DeepSpeed 0.19.8 reads from its JSON, and those it has dropped. A test compares them with DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..recipe.text_files import words

DEEPSPEED_VERSION = "0.19.8"

TOP_LEVEL = words(
    """
    activation_checkpointing aio autotuning bf16 checkpoint comet comms_logger communication_data_type compile
    csv_monitor data_efficiency data_parallel_size data_types dataloader_drop_last datastates_ckpt disable_allgather
    disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op
    gradient_clipping gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation memory_breakdown
    optimizer pipeline prescale_gradients scheduler seq_parallel_communication_data_type sequence_parallel_size
    steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
    """
)

REMOVED: Mapping[str, str] = {
    "amp": "use bf16, fp16 or torch_autocast",
    "bfloat16": "write bf16",
    "compression_training": "there is no replacement",
    "curriculum_learning": "there is no replacement here",
    "eigenvalue": "there is no replacement",
    "elasticity": "set train_micro_batch_size_per_gpu; a run resumes on any number of ranks without it",
    "graph_harvesting": "there is no replacement",
    "nebula": "checkpoints are written without it",
    "progressive_layer_drop": "there is no replacement",
    "quantize_training": "there is no replacement",
    "sparse_attention": "there is no replacement",
    "sparse_gradients": "there is no replacement",
}

_ZERO = words(
    """
    stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
    allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights
    elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size stage3_prefetch_bucket_size
    stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters
    stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save stage3_module_granularity_threshold
    stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential ignore_unused_parameters legacy_stage1
    round_robin_gradients parameter_alignment zero_hpz_partition_size zero_quantized_weights
    zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint
    override_module_apply log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory
    leaf_module
    """
)

REMOVED_ZERO: Mapping[str, str] = {
    "cpu_offload": 'write "offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": 'write "offload_param": {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "write pin_memory inside offload_optimizer or offload_param",
    "stage3_gather_fp16_weights_on_model_save": "write stage3_gather_16bit_weights_on_model_save",
    "mics_hierarchical_params_gather": "there is no replacement",
    "mics_shard_size": "there is no replacement",
    "zeropp_loco_param": "there is no replacement",
}

# what DeepSpeed's AutoEP is told of the models it knows and of how it computes
AUTOEP = words(
    """
    async_split_plan combine_impl comm_backend comm_max_tokens_per_rank comm_num_sm comm_qp_margin
    disable_triton_grouped_mm expert_activation expert_pattern expert_tensor_parallel_size expert_w1 expert_w2 expert_w3
    gate_up_impl has_shared_experts load_balance_coeff moe_layer_pattern num_expert_groups num_experts_attr
    num_limited_groups preset_model route_norm route_scale routed_scaling_factor router_pattern row_weighting_impl
    score_apply score_func shared_experts_gate_pattern shared_experts_pattern top_k top_k_attr use_grouped_mm
    validate_folding_routing
    """
)

# sub-section: its keys. Sections that are not here are DeepSpeed's own to check
SECTIONS: Mapping[tuple[str, ...], frozenset[str]] = {
    (): TOP_LEVEL,
    ("zero_optimization",): _ZERO,
    ("zero_optimization", "offload_optimizer"): words(
        """
        device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload
        cpuadam_cores_perc
        """
    ),
    ("zero_optimization", "offload_param"): words("device nvme_path buffer_count buffer_size max_in_cpu pin_memory"),
    ("bf16",): words(
        "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
    ),
    ("fp16",): words(
        """
        enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
        min_loss_scale fp16_master_weights_and_grads
        """
    ),
    ("torch_autocast",): words("enabled dtype lower_precision_safe_modules"),
    ("activation_checkpointing",): words(
        """
        partition_activations number_checkpoints contiguous_memory_optimization synchronize_checkpoint_boundary
        profile cpu_checkpointing
        """
    ),
    ("pipeline",): words(
        """
        stages partition seed_layers activation_checkpoint_interval pipe_partitioned grad_partitioned use_reentrant
        """
    ),
    ("optimizer",): words("type params legacy_fusion"),
    ("scheduler",): words("type params"),
    ("tensor_parallel",): words(
        """
        dtype autotp_size tp_overlap_comm vocab_parallel_lm_head vocab_parallel_ce_backend tp injection_policy_tuple
        partition_config preset_model keep_module_on_host kernel_inject
        """
    ),
    ("expert_parallel",): words("enabled autoep_size") | AUTOEP,
    ("data_types",): words("grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules"),
}

# optimizers of DeepSpeed's that are not taken, and what to use instead
OTHER_OPTIMIZERS: Mapping[str, str] = {
    "onebitadam": "gone from DeepSpeed, and inexact",
    "zerooneadam": "gone from DeepSpeed, and inexact",
    "onebitlamb": "gone from DeepSpeed, and inexact",
    "lamb": "scales by norms of whole matrices, which ZeRO cuts",
}

SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")

_MASTER = "checkpoints hold fp32 master weights; leave it out"
_QUANTISED = "inexact, so that losses depend on the layout, and CUDA only; use zero_hpz_partition_size, or leave it out"
_ZENFLOW = "it updates late and leaves gradient accumulation wrong; use offload_optimizer without it"
_SUPER_OFFLOAD = "CUDA only, and checkpoints cannot read it; use offload_optimizer without it"
_AUTOEP: Mapping[str, str] = {
    "": "of DeepSpeed's own layers of experts; here they stay the family's own; leave it out",
    "load_balance_coeff": "leave it out; model.router.bias_update does that",
    "expert_tensor_parallel_size": "experts stay whole; leave it out",
}
_ALONE = "checkpoints are written without it; leave it out"

# settings that DeepSpeed takes in more ways than this product does: where they are, what they may be, and why not more
ALLOWED: tuple[tuple[tuple[str, ...], tuple[Any, ...], str], ...] = (
    (("zero_optimization", "compute_grad_norm"), (True,), "the norm is logged at every step; leave it out"),
    (("zero_optimization", "legacy_stage1"), (False,), "gone from DeepSpeed; leave it out"),
    (("zero_optimization", "zero_quantized_weights"), (False,), _QUANTISED),
    (("zero_optimization", "zero_quantized_gradients"), (False,), _QUANTISED),
    (("zero_optimization", "zero_quantized_nontrainable_weights"), (False,), _QUANTISED),
    (("zero_optimization", "zenflow"), (), _ZENFLOW),
    (("zero_optimization", "offload_optimizer", "super_offload"), (False,), _SUPER_OFFLOAD),
    (
        ("zero_optimization", "offload_optimizer", "ratio"),
        (1,),
        "below 1 DeepSpeed makes a second optimizer, whose moments are out of a checkpoint's reach; use 1.0",
    ),
    (("bf16", "bf16_master_weights_and_grads"), (False,), _MASTER),
    (("bf16", "bf16_optimizer_states"), (False,), "checkpoints hold fp32 moments; leave it out"),
    (("fp16", "fp16_master_weights_and_grads"), (False,), _MASTER),
    (("compile", "deepcompile"), (False,), "CUDA only, and it rewrites the engine's step; leave it out"),
    (("managed_gradient_accumulation",), (True,), "the training loop relies on it; leave it out"),
    (("gradient_allreduce_op",), ("mean",), "the step would depend on the number of ranks; use mean"),
    (("data_efficiency", "enabled"), (False,), "it draws samples in an order of its own; leave it out"),
    (("hybrid_engine", "enabled"), (False,), "for generating between steps; use eval.prompts or `zeropipe generate`"),
    (
        ("autotuning", "enabled"),
        (False,),
        "it restarts runs of its own; use `zeropipe tune` for layout and micro batch",
    ),
    *((("expert_parallel", key), (), _AUTOEP.get(key, _AUTOEP[""])) for key in sorted(AUTOEP)),
    (("weight_quantization",), (), "for inference; use adapter qlora to train on weights in four bits"),
    (("use_data_before_expert_parallelism",), (False,), "ranks that share experts are neighbours; leave it out"),
    (("checkpoint", "load_universal"), (False,), "checkpoints resume on any layout without it; leave it out"),
    (("checkpoint", "writer"), (), _ALONE),
    (("datastates_ckpt",), (), _ALONE),
)
