"""The plan: layouts, batches, steps and what is refused, without torch."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.tiny import GPT2, LLAMA, VOCAB, folder_of_zeros, plan_of, tiny_json, tiny_recipe, tiny_store, write_pair
from tests.unit.data_prep.test_adopt import write_uncounted
from zeropipe.data_prep.errors import UserError
from zeropipe.data_prep.manifest import Manifest, file_record
from zeropipe.launcher.cli import main
from zeropipe.trainer.plan.plan import Layout, Plan


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("plan") / "store")


@pytest.fixture
def plan(store: Path, tmp_path: Path):
    def make(devices: int = 1, ds: dict[str, Any] | None = None, **sections: Any) -> Plan:
        return plan_of(tiny_recipe(store, tmp_path / "run", **sections), tiny_json() if ds is None else ds, devices)

    return make


def refusal(plan, *arguments: Any, **sections: Any) -> str:
    with pytest.raises(UserError) as caught:
        plan(*arguments, **sections)
    message = str(caught.value)
    assert "\n" not in message
    return message


def zero(stage: int, **section: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **section}, "bf16": {"enabled": stage > 0}}


def test_layouts(plan):
    assert plan(4).layout == Layout(4, 4)
    assert plan(8, zero(3, offload_optimizer={"device": "cpu"})).layout == Layout(
        8, 8, zero_stage=3, offload_optimizer=True
    )
    ds = {**zero(1), "tensor_parallel": {"autotp_size": 2}}
    assert plan(8, ds, parallel={"pipeline": 2}).layout == Layout(8, 2, tensor=2, pipeline=2, zero_stage=1)
    assert plan(4, {**zero(2), "sequence_parallel_size": 2}).layout == Layout(4, 2, sequence=2, zero_stage=2)
    assert plan(1, {"tensor_parallel": {"autotp_size": 0}}).layout == Layout(1, 1)


def test_a_pipeline_without_zero_is_planned_as_it_runs(plan):
    """The engine runs it as ZeRO-1: DeepSpeed clips by the wrong norm otherwise."""
    memory = [plan(4, tiny_json(f"zero{stage}"), parallel={"pipeline": 2}).memory for stage in (0, 1)]
    assert memory[0] == memory[1] is not None


def test_everything_of_a_plan(plan, store: Path):
    made = plan(2, tiny_json("zero2", micro=2), duration={"steps": 100}, schedule={"warmup": 0.1})
    assert (made.micro_batch, made.accumulation, made.global_batch, made.seq_len) == (2, 2, 8, 32)
    assert (made.vocab_size, made.padded_vocab_size) == (VOCAB, 512)
    assert (made.total_steps, made.warmup_steps, made.decay_steps) == (100, 10, 90)
    assert made.positions == 100 * 8 * 32
    assert str(made.precision) == "fp32"
    assert made.model_config["vocab_size"] == VOCAB
    assert (made.model_config["eos_token_id"], made.model_config["bos_token_id"]) == (0, 0)
    assert "auto" not in json.dumps(made.deepspeed)
    # 512 x 64 + 64 x 64 embeddings; 2 blocks of 12 x 64^2 matrices and 13 x 64 biases and norms; the last norm
    assert made.parameters == 512 * 64 + 64 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64
    assert made.memory is not None and made.memory.parameters == 4 * made.parameters


def test_the_resolved_pair_plans_to_itself(plan, store: Path, tmp_path: Path):
    from zeropipe.trainer.plan.plan import make_plan
    from zeropipe.trainer.recipe.recipe import dump_recipe, load_recipe

    ds = {**tiny_json("zero1"), "optimizer": {"params": {"weight_decay": 0.1, "eps": 1e-6}}}
    first = plan(2, ds)
    assert first.recipe.optimizer.eps == 1e-6
    (tmp_path / "recipe.yaml").write_text(dump_recipe(first.recipe))
    again = make_plan(load_recipe(str(tmp_path / "recipe.yaml")), first.deepspeed, 2)
    assert again == first


def test_durations(plan, store: Path):
    from zeropipe.data_prep.store import TokenStore

    opened = TokenStore.open(store)
    train = opened.document_start(270)  # 90 % of 300 documents
    samples = (train - 1) // 32
    assert plan().samples == samples
    assert plan(duration={"steps": None, "epochs": 1}).total_steps == samples // 8
    assert plan(duration={"steps": None, "epochs": 2.5}).total_steps == int(2.5 * samples) // 8
    assert plan(duration={"steps": None, "tokens": 8 * 32 * 7}).total_steps == 7
    assert plan(duration={"steps": None, "tokens": 8 * 32 * 7 + 1}).total_steps == 8
    assert "duration.epochs 0.001 is less than one step" in refusal(plan, duration={"steps": None, "epochs": 0.001})


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ({"type": "cosine", "warmup": 0.015}, (3, 197)),
        ({"type": "linear", "warmup": 0}, (0, 200)),
        ({"type": "constant", "warmup": 50}, (50, 0)),
        ({"type": "wsd", "warmup": 10, "decay": 0.2}, (10, 40)),
        ({"type": "wsd", "warmup": 1e-9, "decay": 30}, (1, 30)),
        (
            {"type": "wsd", "warmup": 180, "decay": 30},
            "180 warm-up steps and 30 steps of decay do not fit into 200 steps",
        ),
        ({"type": "cosine", "warmup": 201}, "201 warm-up steps do not fit into 200 steps"),
    ],
)
def test_schedule_steps(plan, schedule: dict, steps: tuple[int, int] | str):
    if isinstance(steps, str):
        assert steps in refusal(plan, duration={"steps": 200}, schedule=schedule)
        return
    made = plan(duration={"steps": 200}, schedule=schedule)
    assert (made.warmup_steps, made.decay_steps) == steps


def test_a_scheduler_in_the_json_replaces_the_schedule(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    recipe = tiny_recipe(store, tmp_path / "run")
    scheduler = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2, "total_num_steps": "auto"}}
    ds = {**tiny_json(), "scheduler": scheduler}
    assert "keep one" in refusal(lambda: plan_of(recipe, ds, 1))
    del recipe["schedule"]
    made = plan_of(recipe, ds, 1)
    assert made.deepspeed["scheduler"]["params"] == {"warmup_num_steps": 2, "total_num_steps": 6}
    assert "schedule" not in made.recipe.model_fields_set
    paths = write_pair(tmp_path, recipe, ds)
    assert main(["plan", str(paths[0]), "--deepspeed_config", str(paths[1])]) == 0
    assert "WarmupDecayLR, the DeepSpeed JSON's own (the recipe's schedule is not used)" in capsys.readouterr().out


PIPELINE = {"parallel": {"pipeline": 2}}
REFUSALS: list[tuple[str, int, dict[str, Any], dict[str, Any], str]] = [
    ("bf16 zero 0", 1, {"bf16": {"enabled": True}}, {}, "bf16 with ZeRO-0: .*use zero_optimization.stage 1"),
    ("stage 4", 1, zero(4), {}, "zero_optimization.stage must be 0, 1, 2 or 3, got 4"),
    ("devices", 3, zero(1), PIPELINE, "3 devices do not fit pipeline 2 x tensor 1 x sequence 1 = 2; nearest: 2 or 4"),
    ("no devices", 0, zero(1), PIPELINE, "0 devices do not fit .* nearest: 2 devices"),
    ("pp zero 2", 2, zero(2), PIPELINE, "pipeline 2 with ZeRO-2: .*stage 1, or parallel.pipeline=1 to keep ZeRO-2"),
    ("pp zero 3", 2, zero(3), PIPELINE, "pipeline 2 with ZeRO-3: pipelines need ZeRO-1"),
    ("pp fp16", 2, {"fp16": {"enabled": True}, "gradient_clipping": 0}, PIPELINE, "fp16 with ZeRO-0 and a pipeline"),
    ("pp overlap", 2, zero(1, overlap_comm=True), PIPELINE, "overlap_comm with a pipeline: set it to false"),
    (
        "pp layers",
        3,
        zero(1),
        {"parallel": {"pipeline": 3}, "batch": {"global": 9}},
        "than the model has layers.*at most 2",
    ),
    ("pp type", 2, zero(1), {"parallel": {"pipeline": 2, "partition": "type:moe"}}, "matches 0 layers, too few for 2"),
    (
        "offload 0",
        1,
        zero(0, offload_optimizer={"device": "cpu"}),
        {},
        "offload_optimizer with ZeRO-0: needs .*1, 2 or 3",
    ),
    ("params 2", 1, zero(2, offload_param={"device": "cpu"}), {}, "offload_param with ZeRO-2: needs .*stage 3"),
    (
        "ratio",
        1,
        zero(2, offload_optimizer={"device": "cpu", "ratio": 0.5}),
        {},
        "ratio 0.5: below 1 DeepSpeed makes a second optimizer, .*; use 1.0",
    ),
    (
        "ratio 3",
        1,
        zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}),
        {},
        "offload_optimizer.ratio 0.5: below",
    ),
    ("fp16 zero 0", 1, {"fp16": {"enabled": True}}, {}, "fp16 with ZeRO-0: .*divides the gradients.*stage 1"),
    (
        "experts",
        1,
        {**zero(1), "expert_parallel": {"enabled": True, "autoep_size": 2}},
        {},
        "expert_parallel.autoep_size 2 does not divide the 1 ranks that see different tokens; sizes that do: 1",
    ),
    (
        "experts of a dense model",
        2,
        {**zero(1), "expert_parallel": {"enabled": True, "autoep_size": 2}},
        {},
        "autoep_size 2 of model_type 'gpt2': it has no experts; leave expert_parallel out",
    ),
    ("experts, not on", 2, {"expert_parallel": {"autoep_size": 2}}, {}, "autoep_size 2 does nothing without enabled"),
    ("experts, how many", 2, {"expert_parallel": {"enabled": True}}, {}, "enabled without autoep_size: state over how"),
    (
        "experts by DeepSpeed",
        2,
        {"expert_parallel": {"enabled": True, "autoep_size": 2, "load_balance_coeff": 0.1}},
        {},
        "expert_parallel.load_balance_coeff 0.1: leave it out; model.router.bias_update does that",
    ),
    (
        "bf16 masters",
        1,
        {**zero(1), "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        {},
        "bf16.bf16_master_weights_and_grads true: ",
    ),
    (
        "bf16 moments",
        1,
        {**zero(1), "bf16": {"enabled": True, "bf16_optimizer_states": True}},
        {},
        "bf16.bf16_optimizer_states true: checkpoints hold fp32 moments; leave it out",
    ),
    ("datastates", 1, {"datastates_ckpt": {"host_cache_size": 16}}, {}, "datastates_ckpt: .*leave it out"),
    ("writer", 1, {"checkpoint": {"writer": {"type": "fast"}}}, {}, "checkpoint.writer: .*leave it out"),
    ("objective", 1, {}, {"objective": "rlhf"}, "no objective 'rlhf'; there are: causal_lm, sft, dpo"),
    ("adapter", 1, {}, {"adapter": {"type": "lorra", "r": 8}}, "no adapter 'lorra', did you mean 'lora'?"),
    ("device", 1, zero(2, offload_optimizer={"device": "gpu"}), {}, "offload_optimizer.device 'gpu': use cpu or none"),
    (
        "min lr",
        1,
        {"optimizer": {"params": {"lr": 1e-6}}},
        {"optimizer": None, "schedule": {"min_lr": 1e-5}},
        "min_lr 1e-05 is above optimizer",
    ),
    (
        "json lr",
        1,
        {"optimizer": {"params": {"lr": "x"}}},
        {"optimizer": None, "schedule": {"min_lr": 1e-5}},
        "optimizer.lr: must be a number",
    ),
    (
        "nvme",
        1,
        zero(3, offload_optimizer={"device": "nvme"}),
        {},
        "device nvme: checkpoints cannot read what is on it; use cpu",
    ),
    ("sp pp", 4, {**zero(1), "sequence_parallel_size": 2}, PIPELINE, "sequence parallel 2 with pipeline 2"),
    (
        "sp tp heads",
        8,
        {**zero(1), "sequence_parallel_size": 2, "tensor_parallel": {"autotp_size": 4}},
        {},
        "sequence parallel 2 does not divide the 1 heads of each of 4 tensor-parallel ranks",
    ),
    ("sp length", 3, {**zero(1), "sequence_parallel_size": 3}, {}, "does not divide data.seq_len 32"),
    (
        "sp heads",
        8,
        {**zero(1), "sequence_parallel_size": 8},
        {},
        "8 does not divide the 4 heads; sizes that do: 1, 2, 4",
    ),
    (
        "sp kv heads",
        4,
        {**zero(1), "sequence_parallel_size": 4},
        {"model": {"config": {**LLAMA, "num_attention_heads": 12, "hidden_size": 96, "num_key_value_heads": 6}}},
        "sequence parallel 4 neither divides nor is a multiple of the 6 key-value heads",
    ),
    (
        "tp kv heads",
        4,
        {**zero(1), "tensor_parallel": {"autotp_size": 4}},
        {"model": {"config": {**LLAMA, "num_attention_heads": 12, "hidden_size": 96, "num_key_value_heads": 6}}},
        "tensor parallel 4 neither divides nor is a multiple of the 6 key-value heads",
    ),
    (
        "tp mlp",
        4,
        {**zero(1), "tensor_parallel": {"autotp_size": 4}},
        {"model": {"config": {**GPT2, "n_inner": 90}}},
        "tensor parallel 4 does not divide the 90 units of the MLP",
    ),
    ("tp heads", 3, {**zero(1), "tensor_parallel": {"autotp_size": 3}}, {}, "does not divide the 4 heads"),
    (
        "tp odd",
        1,
        {"tensor_parallel": {"autotp_size": "2"}},
        {},
        "autotp_size must be a positive whole number, got '2'",
    ),
    ("optimizer", 1, {"optimizer": {"type": "Lion"}}, {}, "optimizer.type 'Lion': use AdamW or Adam"),
    (
        "scheduler",
        1,
        {"scheduler": {"type": "Cosine"}},
        {"schedule": None},
        "scheduler.type 'Cosine': DeepSpeed has LRR",
    ),
    ("clipping", 1, {"gradient_clipping": -1}, {}, "gradient_clipping must be a number, 0 for none; got -1"),
    ("accumulate", 1, {**zero(1), "data_types": {"grad_accum_dtype": "fp16"}}, {}, "grad_accum_dtype 'fp16' with bf16"),
    ("sum", 1, {"gradient_allreduce_op": "sum"}, {}, "gradient_allreduce_op sum: .*use mean"),
    (
        "quantized",
        1,
        zero(3, zero_quantized_weights=True),
        {},
        "zero_quantized_weights true: inexact, so that losses depend",
    ),
    ("typo", 1, {"zero_optimisation": {}}, {}, "DeepSpeed JSON: zero_optimisation: unknown key"),
    ("too long", 1, {}, {"data": {"seq_len": 65}}, "seq_len 65 is longer than the model takes: use data.seq_len=64"),
    (
        "no tokens",
        1,
        {},
        {"batch": {"global": 4000}},
        r"holds \d+ samples of 32 tokens, one global batch takes 4000; use",
    ),
    ("one batch", 16, {}, {}, "batch.global 8 cannot be shared by 16 data-parallel ranks; nearest: 16"),
]


@pytest.mark.parametrize(
    ("devices", "ds", "sections", "message"), [row[1:] for row in REFUSALS], ids=[r[0] for r in REFUSALS]
)
def test_illegal_is_refused_with_what_to_do(
    store: Path, tmp_path: Path, devices: int, ds: dict, sections: dict, message: str
):
    import re

    recipe = tiny_recipe(store, tmp_path / "run", **sections)
    recipe = {key: value for key, value in recipe.items() if value is not None}
    assert re.search(message, refusal(lambda: plan_of(recipe, ds, devices)))


def test_several_refusals_come_in_one_line(plan):
    message = refusal(plan, 2, zero(2, overlap_comm=True), parallel={"pipeline": 2}, data={"seq_len": 65})
    assert message.count(";") >= 2 and "overlap_comm" in message and "ZeRO-2" in message and "seq_len" in message


SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
MIXTRAL = {"model_type": "mixtral", **SMALL, "num_local_experts": 4}


@pytest.mark.parametrize(
    ("config", "router", "sections", "told"),
    [
        (GPT2, {"aux_loss": 0.1}, {}, "model.router.aux_loss of model_type 'gpt2': it has no router; leave it out"),
        ({"model_type": "qwen3", **SMALL}, {"z_loss": 0.1}, {}, "it has no router that transformers names"),
        (MIXTRAL, {"bias_update": 0.1}, {}, "bias_update of model_type 'mixtral': its routers have no e_score_corr"),
        (
            MIXTRAL,
            {"aux_loss": 0.1, "z_loss": 0.1},
            {"parallel": {"pipeline": 2}},
            "model.router.aux_loss and z_loss of model_type 'mixtral' with pipeline 2: labels",
        ),
        (MIXTRAL, {"aux_loss": 0.1}, {"compile": "blocks"}, "compiled blocks are not listened to; set compile to none"),
    ],
)
def test_what_balances_experts_is_refused_where_it_cannot(plan, config, router, sections, told):
    world = 2 if sections.get("parallel") else 1
    assert told in refusal(plan, world, model={"config": config, "router": router}, **sections)


@pytest.mark.parametrize(
    ("size", "ds", "sections", "told"),
    [
        (2, zero(0), {}, "expert_parallel.autoep_size 2 with ZeRO-0: use zero_optimization.stage 1, 2 or 3"),
        (3, zero(1), {}, "autoep_size 3 does not divide the 4 experts; sizes that do: 1, 2, 4"),
        (2, {**zero(1), "tensor_parallel": {"autotp_size": 2}}, {}, "with tensor parallel 2: untried; set one of them"),
        (2, zero(1), {"parallel": {"pipeline": 2}}, "autoep_size 2 with pipeline 2: untried; set one of them to 1"),
        (2, zero(2, reduce_scatter=False), {}, "reduce_scatter false with expert_parallel.autoep_size 2"),
        (2, zero(3, zero_hpz_partition_size=2), {}, "zero_hpz_partition_size 2 with expert_parallel.autoep_size 2"),
        (
            2,
            {"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}},
            {},
            "fp16 with expert_parallel.autoep_size 2: untried",
        ),
        (
            2,
            {**zero(1), "optimizer": {"type": "Muon"}, "gradient_clipping": 0},
            {},
            "Muon with expert_parallel.autoep_",
        ),
        (2, zero(1), {"compile": "blocks"}, "compile blocks with expert_parallel.autoep_size 2"),
        (2, zero(1), {"adapter": {"type": "lora", "r": 4}}, "an adapter with expert_parallel.autoep_size 2: untried"),
    ],
)
def test_experts_are_not_shared_where_they_cannot(plan, size, ds, sections, told):
    experts = {"expert_parallel": {"enabled": True, "autoep_size": size}}
    world = {3: 6}.get(size, 4)
    assert told in refusal(plan, world, {**ds, **experts}, model={"config": MIXTRAL}, batch={"global": 12}, **sections)


MODELS: list[tuple[dict[str, Any], str]] = [
    ({**GPT2, "n_layers": 3}, "model.config.n_layers: unknown key, did you mean 'n_layer'?"),
    ({**LLAMA, "n_embd": 3}, "model.config.n_embd: unknown key"),
    ({**GPT2, "hidden_size": 64}, "model.config.hidden_size and n_embd are two names of one size; keep one"),
    ({"model_type": "gtp2"}, "model.config.model_type: transformers has no 'gtp2', did you mean 'gpt2'?"),
    ({"model_type": "mistal"}, "transformers has no 'mistal', did you mean 'mistral'?"),
    ({"model_type": 5}, "model.config.model_type: must be text, got 5"),
    ({"model_type": "qwen3", "n_layer": 3}, "model.config.n_layer: unknown key, did you mean 'num_hidden_layers'?"),
    ({"model_type": "qwen3", "hiden_size": 3}, "model.config.hiden_size: unknown key, did you mean 'hidden_size'?"),
    (
        {"model_type": "mixtral", "router_aux_loss_coef": 0.1},
        "changes with the layout; set it to 0, or leave it out, and state model.router.aux_loss, whose loss does not",
    ),
    ({"model_type": "mixtral", "output_router_logits": True}, "layout; set it to false"),
    ({**GPT2, "n_head": 5}, "model.config.n_head 5 does not divide n_embd 64; numbers that do: 1, 2, 4, 8, 16, 32, 64"),
    ({**GPT2, "n_layer": 0}, "model.config.n_layer: must be a positive whole number, got 0"),
    ({**LLAMA, "num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
    ({"model_type": "qwen3", **SMALL, "num_key_value_heads": 3}, "num_key_value_heads: 3 (the family's default, where"),
    ({"model_type": "phimoe"}, "model_type 'phimoe' is not trained here: its router draws experts at random"),
    (
        {"model_type": "gemma3"},
        "several models (text_config, vision_config); train its model of texts, 'gemma3_text'",
    ),
    ({**GPT2, "vocab_size": 400}, "vocab_size is 400, the store's tokenizer has 500 tokens; leave it out or state 500"),
    ({**GPT2, "vocab_size": 512}, "vocab_size is 512, the store's tokenizer has 500 tokens; leave it out: the padding"),
]


@pytest.mark.parametrize(("config", "message"), MODELS)
def test_models_that_cannot_be(store: Path, tmp_path: Path, config: dict, message: str):
    recipe = tiny_recipe(store, tmp_path / "run", model={"config": config})
    assert message in refusal(lambda: plan_of(recipe, {}, 1))


def test_other_spellings_of_transformers_are_taken(plan):
    names = {"model_type": "gpt2", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    made = plan(model={"config": {**names, "max_position_embeddings": 64}})
    assert (made.model_config["n_layer"], made.model_config["n_positions"]) == (2, 64)
    assert made.parameters == plan().parameters


def test_stores_that_do_not_fit(store: Path, tmp_path: Path):
    other = tiny_store(tmp_path / "other", documents=40, vocab=300)
    sources = [{"store": str(store)}, {"store": str(other)}]
    message = refusal(lambda: plan_of(tiny_recipe(store, tmp_path, data={"train": sources}), {}, 1))
    assert "the stores were prepared with different tokenizers" in message and "vocabulary 300" in message
    message = refusal(lambda: plan_of(tiny_recipe(tmp_path / "none", tmp_path), {}, 1))
    assert "none" in message and "zeropipe prepare" in message
    bare = next(store.glob("shard-*.idx")).with_suffix("")
    message = refusal(lambda: plan_of(tiny_recipe(bare, tmp_path), {}, 1))
    assert "model.config.vocab_size: missing, and the stores (bare Megatron prefixes) do not record it" in message
    recipe = tiny_recipe(bare, tmp_path, model={"config": {**GPT2, "vocab_size": VOCAB}})
    assert plan_of(recipe, {}, 1).vocab_size == VOCAB
    tiny = tiny_store(tmp_path / "tiny", documents=1)
    message = refusal(lambda: plan_of(tiny_recipe(tiny, tmp_path, data={"seq_len": 64}), {}, 1))
    assert "its train split is shorter than one sample of 64 + 1 tokens" in message


def test_a_prefix_whose_index_leaves_the_ends_out_is_refused_with_the_cure(tmp_path: Path):
    prefix = write_uncounted(tmp_path / "drifted_text_document", [[[1, 2, 3]]] * 9, eod=0)
    message = refusal(lambda: plan_of(tiny_recipe(prefix, tmp_path), {}, 1))
    assert f"{prefix}.bin: 72 bytes, but drifted_text_document.idx describes 54" in message
    assert f"`zeropipe prepare --import {prefix} --tokenizer FOLDER --output STORE`" in message


def hugging_face_folder(path: Path, **config: Any) -> Path:
    return folder_of_zeros(path, {**GPT2, "vocab_size": VOCAB, "eos_token_id": 7, **config})


def test_pretrained_folders(plan, tmp_path: Path):
    folder = hugging_face_folder(tmp_path / "hf", vocab_size=600)
    made = plan(model={"init": str(folder), "config": {"resid_pdrop": 0.3}})
    assert made.vocab_size == 600  # models are often padded beyond their tokenizer
    assert (made.model_config["eos_token_id"], made.model_config["resid_pdrop"]) == (7, 0.3)
    small = hugging_face_folder(tmp_path / "small", vocab_size=400)
    (tmp_path / "bare").mkdir()
    pickled = hugging_face_folder(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for init, config, message in (
        (small, {}, "prepare the data with the tokenizer of the model"),
        (small, {"n_layer": 3, "vocab_size": 500}, "changes the shape of the weights"),
        (small, {"model_type": "llama", "vocab_size": 500}, "model_type is 'llama', "),
        (folder, {"resid_drop": 0.1}, "model.config.resid_drop: unknown key, did you mean 'resid_pdrop'?"),
        (pickled, {}, "must hold *.safetensors; found only pickles (pytorch_model.bin)"),
        (tmp_path / "bare", {}, "no config.json (Hugging Face) and no checkpoints/step-*"),
        (tmp_path / "nowhere", {}, "no such folder"),
    ):
        recipe = tiny_recipe(Path("x"), tmp_path)
        assert message in refusal(plan, model={"init": str(init), "config": config}), recipe


def test_code_in_a_folder_is_never_run_and_nothing_asks(plan, tmp_path: Path, monkeypatch):
    from zeropipe.trainer.export.load import load_model

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    folder = hugging_face_folder(tmp_path / "hf")
    (folder / "modeling_own.py").write_text("raise SystemExit('it ran')")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Model"}
    for model_type in (config["model_type"], "their_own"):
        (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        told = "config.json: auto_map: its model is code of its own (modeling_own.Model), which is never run; if"
        assert told in refusal(plan, model={"init": str(folder), "config": {}})
        with pytest.raises(UserError, match=re.escape(told)):
            load_model(folder)


def test_a_folder_that_lacks_a_weight_is_refused_whichever_stage_would_want_it(plan, tmp_path: Path):
    folder = hugging_face_folder(tmp_path / "hf")
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)

    def refused_with(changed: dict) -> str:
        save_file(changed, file)
        return refusal(plan, 2, model={"init": str(folder), "config": {}}, parallel={"pipeline": 2})

    last = "transformer.h.1.mlp.c_proj.weight"
    lacking = {name: weight for name, weight in weights.items() if name != last}
    assert f"{folder} holds no parameter {last}; is it the same model family?" in refused_with(lacking)
    turned = refused_with({**weights, last: np.ascontiguousarray(weights[last].T)})
    assert f"{file}: {last} has the shape [64, 256], config.json makes it [256, 64]" in turned
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file}: damaged or incomplete" in refusal(plan, model={"init": str(folder), "config": {}})


def test_a_folder_without_the_prefix_of_the_head_is_taken(plan, tmp_path: Path):
    """As GPT-2's own release is."""
    folder = hugging_face_folder(tmp_path / "hf")
    (file,) = folder.glob("*.safetensors")
    save_file({name.removeprefix("transformer."): weight for name, weight in load_file(file).items()}, file)
    assert plan(model={"init": str(folder), "config": {}}).parameters


def test_a_run_of_ours_can_be_continued(plan, tmp_path: Path):
    for step, layers in ((5, 1), (10, 2)):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        config = {**GPT2, "n_layer": layers, "vocab_size": VOCAB}
        (folder / "state.json").write_text(json.dumps({"model_config": config}))
        (folder / "manifest.json").write_text("{}")
    (tmp_path / "run" / "checkpoints" / "step-00000015").mkdir()  # never finished
    (tmp_path / "run" / "checkpoints" / "step-00000015" / "state.json").write_text("{}")
    assert plan(model={"init": str(tmp_path / "run"), "config": {}}).model_config["n_layer"] == 2
    earlier = tmp_path / "run" / "checkpoints" / "step-00000005"
    assert plan(model={"init": str(earlier), "config": {}}).model_config["n_layer"] == 1


def test_the_command_prints_a_table_and_needs_no_torch(store: Path, tmp_path: Path):
    paths = write_pair(tmp_path, tiny_recipe(store, tmp_path / "run"), tiny_json("zero3_offload"))
    code = (
        "import sys; from zeropipe.launcher.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'deepspeed', 'transformers'} & set(sys.modules); sys.exit(code or (9 if heavy else 0))"
    )
    arguments = ["plan", str(paths[0]), "--deepspeed_config", str(paths[1]), "--devices", "2", "duration.steps=500"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for part in (
        "gpt2, 136,960 parameters, vocabulary 500, trained as 512",
        "2 devices: data 2, ZeRO-3, optimizer and param on CPU, fp32",
        "8 sequences of 32 = micro batch 2 x accumulation 2 x data parallel 2",
        "500 = 128,000 sequence positions",
        "cosine, 2 steps of warm-up, 498 steps down to 0",
        "AdamW, lr 0.001, betas [0.9, 0.95], weight decay 0.1, clipped at 0.3",
        "of its host",
        f"zeropipe launch {paths[0]} --deepspeed_config {paths[1]} --devices 2 duration.steps=500",
        f"--num_accelerators 2 --module zeropipe.trainer --run {paths[0]}",
    ):
        assert part in done.stdout
    assert not (tmp_path / "run").exists()


def test_the_command_prints_the_resolved_json(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    paths = write_pair(tmp_path, tiny_recipe(store, tmp_path / "run"), {})
    assert main(["plan", str(paths[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train_batch_size"] == 8
    assert main(["plan", str(paths[0]), "--deepspeed_config", "zero9"]) == 2
    assert capsys.readouterr().err.startswith("error: zero9: no such file")


def tokenizer_folder(path: Path, words: list[str]) -> Path:
    from tokenizers import Tokenizer, models

    path.mkdir(parents=True)
    vocab = {word: number for number, word in enumerate(["<|endoftext|>", *words])}
    Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>")).save(str(path / "tokenizer.json"))
    return path


def test_tokenizer_and_stores_must_belong_together(store: Path, tmp_path: Path):
    bare = next(store.glob("shard-*.idx")).with_suffix("")
    words = [f"w{number}" for number in range(VOCAB - 1)]
    folder = tokenizer_folder(tmp_path / "tokenizer", words)
    made = plan_of({**tiny_recipe(bare, tmp_path), "tokenizer": str(folder)}, {}, 1)
    assert (made.vocab_size, made.model_config["eos_token_id"]) == (VOCAB, 0)

    with_tokenizer = shutil.copytree(store, tmp_path / "with")
    record = file_record(tokenizer_folder(with_tokenizer / "tokenizer", words) / "tokenizer.json")
    replace(Manifest.load(store), tokenizer={"tokenizer.json": record}).save(with_tokenizer)
    own = {**tiny_recipe(with_tokenizer, tmp_path), "tokenizer": str(folder)}
    assert plan_of(own, {}, 1).vocab_size == VOCAB
    other = tokenizer_folder(tmp_path / "other", words[::-1])
    message = refusal(lambda: plan_of({**own, "tokenizer": str(other)}, {}, 1))
    assert "different tokenizers; use the one that prepared the data" in message
    message = refusal(lambda: plan_of({**own, "tokenizer": str(tmp_path / "nowhere")}, {}, 1))
    assert "nowhere/tokenizer.json: cannot be read" in message


def test_validation_stores_are_checked_too(store: Path, tmp_path: Path):
    other = tiny_store(tmp_path / "valid", documents=20, vocab=300)
    recipe = tiny_recipe(store, tmp_path)
    recipe["data"] = {"train": [{"store": str(store)}], "valid": [{"store": str(other)}], "seq_len": 32}
    assert "different tokenizers" in refusal(lambda: plan_of(recipe, {}, 1))
    recipe["data"]["valid"] = [{"store": str(tmp_path / "gone")}]
    assert "gone: no token store here" in refusal(lambda: plan_of(recipe, {}, 1))


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"bf16": {"enabled": True}}, "2 micro batches are summed in bf16, which loses terms; exactly: data_types"),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, "2 micro batches summed in fp32"),
        ({}, None),
    ],
)
def test_it_says_what_gradients_are_summed_in(extra, said, store, tmp_path, capsys):
    paths = write_pair(tmp_path, tiny_recipe(store, tmp_path / "run"), tiny_json("zero2", **extra))
    assert main(["plan", str(paths[0]), "--deepspeed_config", str(paths[1]), "--devices", "2"]) == 0
    printed = capsys.readouterr().out
    assert said in printed if said else "summed" not in printed


def test_texts_that_a_state_would_carry_on_are_refused(plan):
    """Of Mamba no mask keeps two texts apart; of Mistral one does."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
    mamba = {"model_type": "mamba", "state_size": 8, **sizes}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    mistral = {"model_type": "mistral", "intermediate_size": 64, **heads, **sizes}
    for config, refused in ((mamba, True), (mistral, False)):
        sections = {"model": {"init": "random", "config": config}, "data": {"document_mask": True}}
        if refused:
            said = refusal(plan, 1, **sections)
            assert said.startswith("data.document_mask with model_type 'mamba': its state goes on from text to text")
        else:
            plan(1, **sections)
    plan(1, model={"init": "random", "config": mamba})
