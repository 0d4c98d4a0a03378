"""Why keys of Axolotl's have no counterpart here, for those whose reason is the same whatever they say."""

from __future__ import annotations

from ...trainer.recipe.text_files import words

_TABLE = {
    "metrics go to metrics.jsonl and TensorBoard": """
        wandb_project wandb_entity wandb_watch wandb_name wandb_run_id wandb_mode wandb_log_model use_wandb
        mlflow_tracking_uri mlflow_experiment_name mlflow_run_name use_mlflow hf_mlflow_log_artifacts comet_api_key
        comet_project_name comet_workspace comet_experiment_key comet_mode comet_online use_comet
        include_tokens_per_second""",
    "nothing is uploaded": """
        hub_model_id hub_strategy hub_revision push_dataset_to_hub hf_use_auth_token""",
    "attention is torch's own, which picks the fastest kernel there is; records never see each other": """
        flash_attention sdp_attention xformers_attention flex_attention eager_attention s2_attention attn_implementation
        flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_qkv flash_attn_fuse_mlp flash_optimum""",
    "no such kernels are used": """
        lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel unsloth_cross_entropy_loss unsloth_lora_mlp
        unsloth_lora_qkv unsloth_lora_o unsloth_rms_norm unsloth_rope use_kernels liger_rope liger_rms_norm
        liger_glu_activation liger_swiglu liger_layer_norm liger_fused_linear_cross_entropy cut_cross_entropy
        torch_compile torch_compile_backend torch_compile_mode chunked_cross_entropy""",
    "the class is told by the model's config.json": """
        model_type tokenizer_type base_model_config is_llama_derived_model is_mistral_derived_model
        is_falcon_derived_model is_qwen_derived_model processor_type tokenizer_use_fast tokenizer_legacy
        cls_model_config lora_fan_in_fan_out""",
    "only code that transformers ships is run": "trust_remote_code plugins",
    "it does not change what is learnt": """
        dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory dataloader_pin_memory
        dataloader_num_workers dataloader_prefetch_factor strict local_rank world_size device device_map ddp ddp_timeout
        ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters low_cpu_mem_usage lora_on_cpu gc_steps
        remove_unused_columns pad_to_sequence_len eval_batch_size eval_sample_packing sample_packing_group_size
        sample_packing_bin_size sample_packing_eff_est multipack_real_batches shuffle_merged_datasets debug tf32
        save_safetensors save_only_model max_memory gpu_memory_limit qlora_sharded_model_loading total_num_tokens
        gradient_checkpointing_kwargs accelerator_config skip_prepare_dataset resume_from_checkpoint profiler_steps
        auto_resume_from_checkpoints logging_first_step embeddings_skip_upcast eval_accumulation_steps""",
    "the order of samples follows from the data and the seed alone": """
        group_by_length curriculum_sampling sample_packing_sequentially""",
    "there is no such evaluation; `zeropipe eval` and `zeropipe generate` work on any checkpoint": """
        eval_table_size eval_max_new_tokens do_bench_eval do_causal_lm_eval eval_causal_lm_metrics bench_dataset
        metric_for_best_model greater_is_better load_best_model_at_end early_stopping_patience
        loss_watchdog_threshold loss_watchdog_patience""",
    "the tokenizer is taken as its folder has it; change it there": """
        special_tokens tokens added_tokens_overrides resize_token_embeddings_to_32x fix_untrained_tokens
        mean_resizing_embeddings shrink_embeddings default_system_message""",
    "stop tokens are those of the model and of the template's end of turn": "eot_tokens",
    "all parameters are trained, or the adapter's and modules_to_save": """
        unfrozen_parameters peft_layers_to_transform peft_layers_pattern peft_layer_replication
        peft_trainable_token_indices lora_target_parameters lisa_n_layers lisa_step_interval""",
    "the adapter starts afresh": "lora_model_dir",
    "there is no counterpart": """
        relora relora_steps relora_prune_ratio relora_warmup_steps relora_cpu_offload loftq_config peft gptq
        bnb_config_kwargs loraplus_lr_embedding merge_lora lr_groups lr_quadratic_warmup cosine_constant_lr_ratio
        optim_args optim_target_modules torchdistx_path adam_epsilon2 adam_beta3 neftune_noise_alpha
        noisy_embedding_alpha label_smoothing_factor use_pose pose_max_context_len
        pose_num_chunks pose_split_on_token_ids batch_flattening auto_find_batch_size min_sample_len max_prompt_len
        dataset_exact_deduplication dpo_use_weighting dpo_use_logits_to_keep rpo_alpha dpo_norm_loss reward_model
        process_reward_model trl vllm qat quantization fp8 rl_adapter_ref_model orpo_alpha simpo_gamma cpo_alpha
        overrides_of_model_kwargs model_kwargs revision_of_model streaming dataset_shard_num dataset_shard_idx""",
}
REASONS = {key: why for why, keys in _TABLE.items() for key in sorted(words(keys))}

DATASET_REASONS = {
    "name": "a configuration of a hub data set: save the one you mean as files",
    "revision": "of a hub data set: what is on this machine is read",
    "ds_type": "told by the file's suffix",
    "trust_remote_code": "data sets are read as files; no code of theirs is run",
    "shards": "all of the files are read",
    "shards_idx": "all of the files are read",
    "preprocess_shards": "it does not change what is learnt",
    "conversation": "roles are written by the chat template",
    "prompt_format": "the prompt is written by the chat template",
    "message_field_training": "what is trained is told by roles; split the records otherwise",
    "message_field_training_detail": "what is trained is told by roles; split the records otherwise",
}
