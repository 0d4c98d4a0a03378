"""Axolotl files as people write them: what comes of every key, and that none is lost."""

import json
import shlex
from pathlib import Path

import pytest
import yaml

from zeropipe.launcher.axolotl.convert import convert
from zeropipe.launcher.cli import main, parse_command
from zeropipe.trainer.adapters.registry import ADAPTERS
from zeropipe.trainer.objectives.registry import OBJECTIVES
from zeropipe.trainer.optim.registry import OPTIMIZERS
from zeropipe.trainer.plan.settings import read_settings
from zeropipe.trainer.recipe.recipe import Recipe
from zeropipe.trainer.recipe.sources import Data

LORA = """\
base_model: ./llama
model_type: LlamaForCausalLM
load_in_8bit: true
load_in_4bit: false
strict: false
datasets:
  - path: data/alpaca.jsonl
    type: alpaca
  - path: json
    data_files: [own/a.jsonl, own/b.jsonl]
    ds_type: json
    type: chat_template
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
    roles_to_train: [assistant]
val_set_size: 0.05
output_dir: ./outputs/lora
sequence_len: 2048
sample_packing: true
pad_to_sequence_len: true
adapter: lora
lora_model_dir:
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true
lora_modules_to_save: [embed_tokens, lm_head]
peft_use_rslora: true
loraplus_lr_ratio: 16
wandb_project:
wandb_entity: me
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: paged_adamw_8bit
lr_scheduler: cosine
cosine_min_lr_ratio: 0.1
learning_rate: "2e-4"
train_on_inputs: false
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
save_steps: 200
save_total_limit: 2
weight_decay: 0.1
deepspeed: deepspeed_configs/zero2.json
special_tokens:
  pad_token: <|end|>
sample_paking: true
"""
QLORA = """\
base_model: google/gemma-3-1b-it
load_in_4bit: true
chat_template: jinja
chat_template_jinja: "{{ messages }}"
datasets: [{path: some/chats, type: chat_template, split: 'train[:10%]', roles_to_train: [assistant, user]}]
test_datasets: [{path: held.jsonl, type: chat_template}]
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
sequence_len: 1024
micro_batch_size: 1
batch_size: 8
max_steps: 400
eval_steps: 0.25
save_strategy: "no"
lr_scheduler: constant_with_warmup
learning_rate: 0.0002
warmup_ratio: 0.1
fp16: true
bf16: false
adam_beta2: 0.95
adam_epsilon: 0.00001
max_grad_norm: 0.3
seed: 7
"""
DPO = """\
base_model: ./llama
rl: ipo
rl_beta: 0.2
datasets: [{path: pairs.jsonl, type: chatml.intel}]
sequence_len: 512
micro_batch_size: 4
gradient_accumulation_steps: 1
learning_rate: 5e-6
optimizer: lion_8bit
lr_scheduler: rex
context_parallel_size: 2
fsdp: [full_shard, auto_wrap]
fsdp_config: {fsdp_offload_params: true}
"""
TEXT = """\
base_model: ./llama
datasets: [{path: corpus, type: completion, field: body}]
sequence_len: 4096
micro_batch_size: 2
gradient_accumulation_steps: 8
num_epochs: 0.5
learning_rate: 1e-5
warmup_ratio: 0
bf16: true
deepspeed: ds.json
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").mkdir()
    return tmp_path


@pytest.fixture
def imported(folder, capsys):
    """Imports a text by the command line; returns recipe, JSON, commands by verb and what was printed."""

    def run(text, devices=1, name="try"):
        (folder / f"{name}.yml").write_text(text)
        code = main(["import-axolotl", f"{name}.yml", "--devices", str(devices), "--output", "out", "--overwrite"])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        recipe = yaml.safe_load(Path("out/recipe.yaml").read_text())
        ds = json.loads(Path("out/deepspeed.json").read_text())
        must_be_legal(recipe, ds, captured.out)
        return recipe, ds, captured.out

    return run


def must_be_legal(recipe, ds, printed):
    """Everything of fine-tuning's is held to what reads it, as soon as that is there."""
    read_settings(ds)
    landed = "packing" in Data.model_fields
    if not landed:
        recipe = {**recipe, "data": {key: value for key, value in recipe["data"].items() if key != "packing"}}
    Recipe.model_validate(recipe)
    for registry, stated in ((OBJECTIVES, recipe["objective"]), (ADAPTERS, recipe["adapter"])):
        if (stated if isinstance(stated, str) else stated["type"]) in registry:
            registry.make(stated)
    for words in commands(printed):
        if landed or "--format" not in words:
            parse_command(words[1:])


def commands(printed):
    listed = printed[printed.index("next:") :].split("\n\n")[0]
    return [shlex.split(line) for line in listed.splitlines()[1:]]


def test_lora_on_conversations(imported):
    recipe, ds, printed = imported(LORA, devices=4)
    assert recipe == {
        "name": "try",
        "seed": 42,
        "output": "./outputs/lora",
        "model": {"init": "./llama"},
        "data": {"train": [{"store": "data/try"}], "seq_len": 2048, "split": "0.95,0.05", "packing": "best_fit"},
        "objective": "sft",
        "adapter": {
            "type": "lora",
            "r": 16,
            "alpha": 32,
            "dropout": 0.05,
            "targets": "all-linear",
            "modules_to_save": ["embed_tokens", "lm_head"],
            "rslora": True,
            "lr_ratio": 16,
        },
        "batch": {"global": 32},
        "duration": {"epochs": 3.0},
        "optimizer": {"lr": 2e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1},
        "schedule": {"type": "cosine", "warmup": 10, "min_lr": pytest.approx(2e-5)},
        "log": {"every": 1},
        "save": {"every": 200, "keep": 2},
    }
    assert ds == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW"},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "activation_checkpointing": {},
    }
    prepare, plan, launch = commands(printed)
    assert " ".join(prepare) == (
        "zeropipe prepare --format sft --input data/alpaca.jsonl own/a.jsonl own/b.jsonl --tokenizer ./llama "
        "--output data/try --seq-len 2048"
    )
    for words in (plan, launch):
        args = parse_command(words[1:])
        assert (args.recipe, args.deepspeed_config, args.devices) == ("out/recipe.yaml", "out/deepspeed.json", 4)
    assert "#   " + " ".join(prepare) in Path("out/recipe.yaml").read_text()


def test_every_key_is_taken_or_named(imported):
    """Each stated key of the file is in one of the three lists, or what it says is in one of the two files."""
    _, _, printed = imported(LORA, devices=4)
    left_out = printed[printed.index("left out:") :]
    for key in (
        "load_in_8bit (line 3)",
        "datasets.1.ds_type (line 11)",
        "wandb_entity",
        "special_tokens",
        "evals_per_epoch",
    ):
        assert key in left_out
    assert "sample_paking (line 53): unknown to this import" in left_out
    for key in ("lora_model_dir", "wandb_project", "tf32", "strict"):
        assert key in left_out[left_out.index("ask for nothing") :]
    changed = printed[printed.index("not as") : printed.index("left out:")]
    for note in (
        "optimizer (line 35): AdamW",
        "deepspeed (line 50): no such file; by its name ZeRO 2",
        "datasets.0.type",
    ):
        assert note in changed
    assert "base_model" not in changed  # it is here


def test_no_key_disappears(folder):
    """A key alone: taken by one of the readers, or in a list; a defect that forgets `leave_rest` fails here."""
    base = "base_model: ./llama\ndatasets: [{path: a.jsonl, type: chat_template}]\nlearning_rate: 1e-4\n"
    for key in (
        "liger_rope",
        "relora_steps",
        "some_new_key",
        "unfrozen_parameters",
        "hub_model_id",
    ):
        (folder / "one.yml").write_text(base + f"{key}: 5\n")
        _, _, notes = convert(Path("one.yml"), Path("out"), 1)
        assert any(note.startswith(f"{key} (line 4): ") for note in notes.left_out), key


def test_qlora_with_a_template_of_its_own(imported):
    recipe, ds, printed = imported(QLORA, devices=2)
    assert recipe["adapter"] == {"type": "qlora", "r": 32, "alpha": 16, "targets": ["q_proj", "v_proj"]}
    assert recipe["data"] == {
        "train": [{"store": "data/try"}], "seq_len": 1024, "valid": [{"store": "data/try-valid"}], "packing": "none",
    }  # fmt: skip
    assert recipe["batch"] == {"global": 16} and recipe["duration"] == {"steps": 400} and recipe["seed"] == 7
    assert recipe["eval"] == {"every": 100} and recipe["save"] == {"every": 0}
    assert recipe["schedule"] == {"type": "constant", "warmup": 0.1}
    assert recipe["optimizer"]["betas"] == [0.9, 0.95] and recipe["optimizer"]["eps"] == 1e-5
    assert ds["fp16"] == {"enabled": True} and "bf16" not in ds and ds["gradient_clipping"] == 0.3
    train, held, *_ = commands(printed)
    assert train[train.index("--train-on") + 1] == "all" and "data/try-valid" in held and "held.jsonl" in held
    assert train[-2:] == held[-2:] == ["--chat-template", "out/chat_template.jinja"]
    assert Path("out/chat_template.jinja").read_text() == "{{ messages }}"
    for note in ("no folder google/gemma-3-1b-it here", "not on this machine: some/chats", "save that part as a file"):
        assert note in printed


def test_preferences(imported):
    recipe, ds, printed = imported(DPO, devices=8)
    assert recipe["objective"] == {"type": "dpo", "beta": 0.2, "loss": "ipo"}
    assert recipe["data"]["seq_len"] == 1024 and recipe["data"]["packing"] == "none"
    assert recipe["batch"] == {"global": 16} and recipe["eval"] == {"every": 0} and recipe["adapter"] == "none"
    assert recipe["schedule"] == {"type": "cosine", "warmup": 0.03}
    assert ds["sequence_parallel_size"] == 2
    offloaded = {"device": "cpu"}
    assert ds["zero_optimization"] == {"stage": 3, "offload_optimizer": offloaded, "offload_param": offloaded}
    assert commands(printed)[0][2:4] == ["--format", "dpo"]
    for note in (
        "chatml.intel: the keys of records have to be prompt, chosen and rejected",
        "lion_8bit",
        "cosine stands",
    ):
        assert note in printed


def test_text_and_a_json_of_its_own(imported, folder):
    own = {
        "zero_optimization": {"stage": 3, "overlap_comm": True, "reduce_bucket_size": "auto"},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
        "gradient_clipping": 0.5,
        "train_micro_batch_size_per_gpu": "auto",
    }
    (folder / "ds.json").write_text(json.dumps(own))
    recipe, ds, printed = imported(TEXT, devices=2)
    assert recipe["objective"] == "causal_lm" and "packing" not in recipe["data"] and recipe["batch"] == {"global": 32}
    assert recipe["duration"] == {"epochs": 0.5} and recipe["schedule"]["warmup"] == 0
    assert ds["zero_optimization"] == {"stage": 3, "overlap_comm": True}
    assert ds["gradient_clipping"] == 0.5 and ds["bf16"] == {"enabled": True} and "fp16" not in ds
    assert "scheduler" not in ds and "optimizer, scheduler of it come from the other keys" in printed
    words = commands(printed)[0]
    assert "--format" not in words and words[-2:] == ["--text-key", "body"]
    assert parse_command(words[1:]).text_key == "body"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("learning_rate: fast", "line 10: learning_rate: must be a number, got 'fast'"),
        ("micro_batch_size: 0", "line 10: micro_batch_size: must be 1 or more, got 0"),
        ("sequence_len: 10.5", "line 10: sequence_len: must be a whole number, got 10.5"),
        ("train_on_inputs: maybe", "line 10: train_on_inputs: must be true or false, got 'maybe'"),
        ("rl: kto", "line 10: rl: has no counterpart here; there are dpo and ipo, got 'kto'"),
        ("adapter: llama-adapter", "line 10: adapter: has no counterpart here; there are lora and qlora"),
        ("tensor_parallel_size: 3", "line 10: tensor_parallel_size: does not divide the 2 devices"),
        ("warmup_ratio: 2", "line 10: warmup_ratio: must be below 1"),
        ("datasets: text", "line 10: datasets: must be a list of mappings, got 'text'"),
        ("datasets:\n  - type: alpaca", "line 11: datasets.0.path: missing"),
        ("excess_length_strategy: cut", "line 10: excess_length_strategy: must be one of drop, truncate, raise"),
        ("deepspeed: somewhere.json", "line 10: deepspeed: no such file, got 'somewhere.json'"),
        ("deepspeed: {zero_optimization: {stage: 7}}", "zero_optimization.stage must be 0, 1, 2 or 3"),
        ("base_model:", "base_model: missing"),
        ("learning_rate: 0", "the recipe that comes of it: optimizer.lr: must be greater than 0, got 0.0"),
        ("neftune_noise_alpha: -5", "the recipe that comes of it: objective.neftune -5: must be a number above 0"),
        ("x: [", "line 11: "),
        ("x: 1\nx: 2", "line 11: 'x' is stated twice"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(folder, capsys, change, message):
    key = change.split(":")[0]
    text = TEXT.replace("type: completion, field: body", "type: chat_template")
    lines = [line for line in text.splitlines() if not line.startswith((key, "deepspeed"))]
    lines += ["# a comment"] * (9 - len(lines)) + [change]
    (folder / "try.yml").write_text("\n".join(lines) + "\n")
    assert main(["import-axolotl", "try.yml", "--devices", "2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: try.yml") and message in error and error.count("\n") == 1, error
    assert not Path("try").exists()


def test_files_that_are_there_are_kept(folder, capsys):
    (folder / "try.yml").write_text(TEXT.replace("deepspeed: ds.json", ""))
    assert main(["import-axolotl", "try.yml"]) == 0
    (folder / "try" / "recipe.yaml").write_text("mine")
    assert main(["import-axolotl", "try.yml"]) == 2
    assert "try/recipe.yaml" in capsys.readouterr().err and (folder / "try" / "recipe.yaml").read_text() == "mine"
    assert main(["import-axolotl", "try.yml", "--overwrite"]) == 0
    assert main(["import-axolotl", "none.yml"]) == 2
    assert main(["import-axolotl", "try.yml", "--devices", "0"]) == 2


def test_optimizers_that_there_are_keep_their_name(imported):
    for name in OPTIMIZERS:
        kind = OPTIMIZERS[name].types[0]
        _, ds, _ = imported(TEXT.replace("deepspeed: ds.json", f"optimizer: {kind.lower()}"))
        assert ds["optimizer"]["type"] == kind


def test_the_rate_of_embedding_and_head(imported):
    text = TEXT.replace("deepspeed: ds.json", "")
    for stated, rate in (("embedding_lr: 2e-6", 2e-6), ("embedding_lr: 1\nembedding_lr_scale: 0.5", 5e-6)):
        recipe, _, printed = imported(text + stated)
        assert recipe["optimizer"]["embedding_lr"] == pytest.approx(rate) and "embedding" not in printed
    recipe, _, printed = imported(text + "adapter: lora\nembedding_lr: 2e-6")
    assert "embedding_lr" not in recipe["optimizer"]
    assert "embedding_lr (line 12): the adapter leaves embedding and head as they are" in printed
    saved = "adapter: lora\nlora_modules_to_save: [lm_head]\nembedding_lr: 2e-6"
    assert imported(text + saved)[0]["optimizer"]["embedding_lr"] == pytest.approx(2e-6)


def test_noise_and_smoothing(imported):
    text = TEXT.replace("deepspeed: ds.json", "label_smoothing_factor: 0.1\nneftune_noise_alpha: 5\n")
    recipe, _, printed = imported(text)
    assert recipe["objective"] == {"type": "causal_lm", "label_smoothing": 0.1}
    assert "neftune_noise_alpha (line 11): there is no counterpart" in printed  # for records alone
    recipe, _, printed = imported(text.replace("type: completion, field: body", "type: chat_template"))
    assert recipe["objective"] == {"type": "sft", "label_smoothing": 0.1, "neftune": 5}
    assert "neftune_noise_alpha (line 11): scaled by the length of each record" in printed
