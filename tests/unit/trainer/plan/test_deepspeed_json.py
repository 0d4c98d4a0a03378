"""The DeepSpeed JSON: what DeepSpeed itself reads, the shipped files, and reconciling with a recipe."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.plan.deepspeed_json import (
    default_micro_batch,
    fill_scheduler,
    load_ds_config,
    load_pair,
)
from zeropipe.trainer.plan.deepspeed_json import reconcile as reconcile_settings
from zeropipe.trainer.plan.deepspeed_keys import DEEPSPEED_VERSION, REMOVED, REMOVED_ZERO, SECTIONS, TOP_LEVEL
from zeropipe.trainer.plan.layout import Layout
from zeropipe.trainer.plan.settings import precision_of, read_settings, unknown_keys
from zeropipe.trainer.recipe.recipe import Recipe
from zeropipe.trainer.recipe.text_files import shipped_names


def make_recipe(**sections: Any) -> Recipe:
    values = {
        "model": {"config": {"model_type": "gpt2"}},
        "data": {"train": [{"store": "x"}], "seq_len": 1024},
        "batch": {"global": 8},
        "duration": {"steps": 10},
    }
    return Recipe.model_validate({**values, **sections})


def reconcile(recipe: Recipe, ds: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    return reconcile_settings(recipe, read_settings(ds), layout)


class Asked(dict):
    """A JSON that remembers which of its keys it was asked for."""

    keys_asked: set[str]

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(str(key))
        return dict.__contains__(self, key)

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return dict.__getitem__(self, key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return dict.get(self, key, default)

    def keys(self) -> Any:
        asked = self

        class Keys:
            def __contains__(self, key: object) -> bool:
                return key in asked

            def __iter__(self):
                return dict.__iter__(asked)

        return Keys()


def test_top_level_keys_are_those_that_deepspeed_asks_for():
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig

    assert deepspeed.__version__.split("+")[0] == DEEPSPEED_VERSION, "go through trainer/plan/deepspeed_keys.py again"
    asked = Asked(train_batch_size=1, train_micro_batch_size_per_gpu=1)
    asked.keys_asked = set()
    DeepSpeedConfig(asked)  # type: ignore[arg-type]
    elsewhere = {"sequence_parallel_size", "data_parallel_size"}  # deepspeed.initialize asks for these two
    assert asked.keys_asked - set(REMOVED) | elsewhere == TOP_LEVEL
    assert set(REMOVED) <= asked.keys_asked


def test_removed_keys_are_deepspeeds():
    from deepspeed.runtime import config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert set(REMOVED) == {*config._REMOVED_TOP_LEVEL_CONFIG_KEYS, "bfloat16"}
    deprecated = {
        name
        for name, field in DeepSpeedZeroConfig.model_fields.items()
        if "deprecated" in (field.json_schema_extra or {})
    }
    assert set(REMOVED_ZERO) == {*config._REMOVED_ZERO_CONFIG_KEYS, *deprecated}


def test_keys_of_sections_are_those_of_deepspeeds_models():
    from deepspeed.runtime import constants
    from deepspeed.runtime.activation_checkpointing import config as checkpointing
    from deepspeed.runtime.config import get_pipeline_config
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero import config as zero
    from deepspeed.runtime.zero import offload_config as offload

    def names(model: Any) -> set[str]:
        return {field.alias or name for name, field in model.model_fields.items()}

    assert SECTIONS["zero_optimization",] == names(zero.DeepSpeedZeroConfig) - set(REMOVED_ZERO)
    path = "zero_optimization", "offload_optimizer"
    assert SECTIONS[path] == names(offload.DeepSpeedZeroOffloadOptimizerConfig)
    assert SECTIONS["zero_optimization", "offload_param"] == names(offload.DeepSpeedZeroOffloadParamConfig)
    assert SECTIONS["bf16",] == names(DeepSpeedBF16Config)
    assert SECTIONS["fp16",] == names(DeepSpeedFP16Config)
    assert SECTIONS["tensor_parallel",] == names(TPTrainingConfig)
    assert SECTIONS["pipeline",] == {*get_pipeline_config({}), "use_reentrant"}
    assert SECTIONS["activation_checkpointing",] == set(checkpointing.ACT_CHKPT_DEFAULT)
    assert SECTIONS["data_types",] == {
        constants.GRAD_ACCUM_DTYPE,
        constants.PARAM_DTYPE,
        constants.BUFFER_DTYPE,
        constants.KEEP_IN_FP32_MODULES,
    }


SHIPPED = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def test_shipped_names():
    assert set(SHIPPED) <= set(shipped_names("ds_configs", ".json"))


@pytest.mark.parametrize("name", shipped_names("ds_configs", ".json"))
def test_shipped_files_load_through_deepspeeds_own_class(name: str):
    from deepspeed.runtime.config import DeepSpeedConfig

    shipped = load_ds_config(name)
    assert '"auto"' not in json.dumps(shipped) and "train_micro_batch_size_per_gpu" not in shipped
    ds = {**shipped, "train_micro_batch_size_per_gpu": 2}  # without a run's plan DeepSpeed wants a batch size stated
    for json_ in (ds, reconcile(make_recipe(batch={"global": 16}), shipped, Layout(1, 1))):
        config = DeepSpeedConfig(copy.deepcopy(json_))  # type: ignore[arg-type]
        assert config.gradient_clipping == 1.0
        assert config.optimizer_name == "adamw"
    if name in SHIPPED:
        config = DeepSpeedConfig(copy.deepcopy(ds))  # type: ignore[arg-type]
        assert config.zero_optimization_stage == int(name[4])
        assert config.bfloat16_config.enabled is (name != "zero0")
        offloaded = config.zero_config.offload_optimizer, config.zero_config.offload_param
        assert [bool(part) for part in offloaded] == [name.endswith("offload"), name == "zero3_offload"]


def test_unknown_keys_are_refused_with_the_nearest(tmp_path: Path):
    path = tmp_path / "ds.json"
    for text, expected in (
        ('{"zero_optimisation": {}}', "zero_optimisation: unknown key, did you mean 'zero_optimization'?"),
        ('{"stage": 2}', "stage: unknown key, did you mean 'zero_optimization.stage'?"),
        ('{"zero_optimization": {"stge": 2}}', "zero_optimization.stge: unknown key, did you mean 'stage'?"),
        ('{"bf16": {"enable": true}}', "bf16.enable: unknown key, did you mean 'enabled'?"),
        ('{"optimizer": {"params": {"LR": 1}}}', "optimizer.params.LR: unknown key"),
        ('{"optimizer": {"params": {"max_grad_norm": 1}}}', "max_grad_norm: write gradient_clipping at the top level"),
        ('{"elasticity": {}}', "elasticity: gone from DeepSpeed 0.19.8; set train_micro_batch_size_per_gpu"),
        ('{"zero_optimization": {"cpu_offload": true}}', 'cpu_offload: gone from DeepSpeed 0.19.8; write "offload_opt'),
        ('{"zero_optimization": true}', "zero_optimization: must be an object, got True"),
        ('{"bf16": 1, "bf16": 2}', "'bf16' is stated twice"),
        ('{"bf16": 1,}', "ds.json, line 1, column 12: not valid JSON"),
        ("[]", "a DeepSpeed configuration is a JSON object; got list"),
        ('{"a": 1, "bf16": {"b": 1}}', "a: unknown key; bf16.b: unknown key"),
    ):
        path.write_text(text)
        with pytest.raises(UserError) as caught:
            load_ds_config(str(path))
        assert expected in str(caught.value)
        assert "ds.json" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(
        UserError, match=r"zero5: no such file, did you mean 'zero\d'\?; shipped ds_configs: demo, zero0"
    ):
        load_ds_config("zero5")
    assert unknown_keys({"optimizer": "auto", "fp16": None}) == []


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("zero_optimization.reduce_bucket_size", "5e8", "must be a whole number of elements, got '5e8'"),
        ("zero_optimization.allgather_bucket_size", 2.5, "must be a whole number of elements, got 2.5"),
        ("zero_optimization.sub_group_size", -1, "must be a whole number of elements, got -1"),
        ("zero_optimization.stage3_param_persistence_threshold", [], "must be a whole number of elements, got []"),
        ("zero_optimization.stage3_max_live_parameters", True, "must be a whole number of elements, got True"),
        ("zero_optimization.stage3_max_reuse_distance", "x", "must be a whole number of elements, got 'x'"),
        ("zero_optimization.stage3_prefetch_bucket_size", "x", "must be a whole number of elements, got 'x'"),
        ("zero_optimization.overlap_comm", "true", "must be true or false, got 'true'"),
        ("zero_optimization.stage", "2", "must be 0, 1, 2 or 3, got '2'"),
        ("zero_optimization.offload_optimizer.ratio", "0.5", "0.5: below 1 DeepSpeed makes a second optimizer"),
        ("zero_optimization.offload_optimizer.device", 1, "1: use cpu or none"),
        ("gradient_accumulation_steps", 1.5, "must be a positive whole number, got 1.5"),
        ("gradient_clipping", "1.0", "must be a number, 0 for none; got '1.0'"),
        ("sequence_parallel_size", "2", "must be a positive whole number, got '2'"),
        ("pipeline.stages", "2", "must be a positive whole number, got '2'"),
    ],
)
def test_every_typed_value_is_checked(tmp_path: Path, key: str, value: Any, expected: str):
    *sections, last = key.split(".")
    ds: dict[str, Any] = {last: value}
    for section in reversed(sections):
        ds = {section: ds}
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    with pytest.raises(UserError) as caught:
        load_ds_config(str(tmp_path / "ds.json"))
    assert f"ds.json: {key} {expected}" in str(caught.value) and "\n" not in str(caught.value)


def test_defaults_of_settings_are_deepspeeds():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings, theirs = read_settings({}), DeepSpeedZeroConfig()
    assert settings.reduce_bucket_size == theirs.reduce_bucket_size
    assert settings.allgather_bucket_size == theirs.allgather_bucket_size
    assert settings.sub_group_size == theirs.sub_group_size
    assert settings.prefetch_bucket_size == theirs.prefetch_bucket_size
    assert settings.persistence_threshold == theirs.param_persistence_threshold
    assert settings.max_live_parameters == theirs.max_live_parameters
    assert settings.max_reuse_distance == theirs.max_reuse_distance
    assert settings.zero_stage == theirs.stage


def test_whole_numbers_may_be_written_with_exponents():
    settings = read_settings({"zero_optimization": {"reduce_bucket_size": 5e7}})
    assert settings.reduce_bucket_size == 50_000_000 and isinstance(settings.reduce_bucket_size, int)


def test_overrides_that_begin_with_ds_are_the_jsons():
    overrides = ["ds.zero_optimization.stage=3", "batch.global=6", "ds.train_micro_batch_size_per_gpu=2"]
    recipe, ds = load_pair("demo", "zero1", overrides)
    assert recipe.batch.global_batch == 6
    assert (ds["zero_optimization"]["stage"], ds["train_micro_batch_size_per_gpu"]) == (3, 2)
    assert load_ds_config("zero1")["zero_optimization"]["stage"] == 1
    for override, expected in (
        ("ds.zero_optimization.stge=3", "zero1.json: zero_optimization.stge: unknown key, did you mean 'stage'?"),
        ("ds.stage=3", "stage: unknown key, did you mean 'zero_optimization.stage'?"),
        ("ds.zero_optimization.stage.x=3", "zero_optimization.stage is a plain value; there is no 'x' in it"),
        ("ds.zero_optimization.stage=5", "zero_optimization.stage must be 0, 1, 2 or 3, got 5"),
        ("ds.=5", "overrides are written section.key=value"),
    ):
        with pytest.raises(UserError) as caught:
            load_pair("demo", "zero1", [override])
        assert expected in str(caught.value)


def test_absent_and_auto_are_filled():
    ds = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": 0.2}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        "bf16": "auto",
    }
    before = copy.deepcopy(ds)
    resolved = reconcile(make_recipe(optimizer={"lr": 1e-3}), ds, Layout(2, 2, zero_stage=2))
    assert ds == before
    assert resolved == {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.2},
        },
        "zero_optimization": {"stage": 2},
    }
    assert reconcile(make_recipe(), {}, Layout(1, 1)) == reconcile(make_recipe(), {"optimizer": None}, Layout(1, 1))


def test_stated_once_wins_stated_twice_must_agree():
    stated_in_json = {"optimizer": {"params": {"lr": 5e-5}}, "train_batch_size": 6}
    resolved = reconcile(make_recipe(batch={}), stated_in_json, Layout(1, 1))
    assert (resolved["optimizer"]["params"]["lr"], resolved["train_batch_size"]) == (5e-5, 6)
    agreeing = make_recipe(optimizer={"lr": 5e-5, "betas": [0.9, 0.95]}, batch={"global": 6})
    assert reconcile(agreeing, resolved, Layout(1, 1)) == resolved


def test_one_error_lists_every_mismatch():
    recipe = make_recipe(optimizer={"lr": 1e-3, "eps": 1e-6}, schedule={"type": "linear"}, parallel={"pipeline": 2})
    ds = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 3,
        "optimizer": {"params": {"lr": 2e-3, "eps": 1e-8, "betas": [0.9, 0.95]}},
        "scheduler": {"type": "WarmupLR", "params": {}},
        "pipeline": {"stages": 4},
    }
    with pytest.raises(UserError) as caught:
        reconcile(recipe, ds, Layout(4, 2, pipeline=2))
    message = str(caught.value)
    assert "\n" not in message and message.startswith("recipe and DeepSpeed JSON do not agree: ")
    for part in (
        "batch.global is 8, train_batch_size is 4",
        "train_micro_batch_size_per_gpu 3 does not divide the 4 sequences of a rank (batch.global 8 / data parallel 2)"
        "; micro batches that do: 1, 2, 4",
        "optimizer.lr is 0.001, optimizer.params.lr is 0.002",
        "optimizer.eps is 1e-06, optimizer.params.eps is 1e-08",
        "schedule: the recipe has a schedule and the JSON has scheduler; keep one",
        "parallel.pipeline is 2, pipeline.stages is 4",
    ):
        assert part in message
    assert "betas" not in message


@pytest.mark.parametrize(
    ("sequences", "ds", "data", "outcome"),
    [
        (8, {}, 2, (4, 1)),
        (512, {}, 2, (4, 64)),
        (8, {"train_micro_batch_size_per_gpu": 2}, 2, (2, 2)),
        (8, {"gradient_accumulation_steps": 4}, 2, (1, 4)),
        (None, {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, 2, (2, 3)),
        (9, {}, 2, "batch.global 9 cannot be shared by 2 data-parallel ranks; nearest: 8 or 10"),
        (8, {}, 16, "batch.global 8 cannot be shared by 16 data-parallel ranks; nearest: 16"),
        (8, {"train_micro_batch_size_per_gpu": 4}, 16, "by 16 data-parallel ranks in micro batches of 4; nearest: 64"),
        (
            8,
            {"gradient_accumulation_steps": 3},
            2,
            "gradient_accumulation_steps is 3, but batch.global 8 / (micro batch",
        ),
        (None, {}, 2, "batch.global is missing"),
        (8, {"train_micro_batch_size_per_gpu": 0}, 2, "must be a positive whole number, got 0"),
        (8, {"train_micro_batch_size_per_gpu": "4"}, 2, "must be a positive whole number, got '4'"),
    ],
)
def test_batches(sequences: int | None, ds: dict, data: int, outcome: tuple[int, int] | str):
    recipe = make_recipe(batch={"global": sequences} if sequences else {})
    if isinstance(outcome, str):
        with pytest.raises(UserError) as caught:
            reconcile(recipe, ds, Layout(data, data))
        assert outcome in str(caught.value)
        return
    resolved = reconcile(recipe, ds, Layout(data, data))
    micro, accumulation = resolved["train_micro_batch_size_per_gpu"], resolved["gradient_accumulation_steps"]
    assert (micro, accumulation) == outcome
    assert micro * accumulation * data == resolved["train_batch_size"]


def test_default_micro_batch():
    assert default_micro_batch(8, 1024) == 4  # 4,096 tokens
    assert default_micro_batch(6, 1024) == 3
    assert default_micro_batch(7, 2048) == 1
    assert default_micro_batch(5, 8192) == 1
    assert default_micro_batch(1000, 128) == 4  # at most
    assert default_micro_batch(25, 128) == 1
    assert default_micro_batch(16, 128, pipeline=2) == 2  # eight micro batches for two stages
    assert default_micro_batch(4, 128, pipeline=2) == 1


def test_precision():
    assert str(precision_of({})) == "fp32"
    assert str(precision_of({"bf16": {"enabled": True}, "fp16": {"enabled": False}})) == "bf16"
    assert str(precision_of({"fp16": {"enabled": True}})) == "fp16"
    assert str(precision_of({"torch_autocast": {"enabled": True, "dtype": "torch.bfloat16"}})) == "bf16_autocast"
    resolved = reconcile(make_recipe(), {"torch_autocast": {"enabled": True}}, Layout(1, 1))
    assert resolved["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    with pytest.raises(UserError, match="bf16 and fp16 are both enabled"):
        precision_of({"bf16": {"enabled": True}, "fp16": {"enabled": True}})
    with pytest.raises(UserError, match=r"bf16.enabled must be true or false, got 'yes'"):
        precision_of({"bf16": {"enabled": "yes"}})
    with pytest.raises(UserError, match=r"torch_autocast.dtype 'float16': use bfloat16"):
        precision_of({"torch_autocast": {"enabled": True, "dtype": "float16"}})


def test_activation_checkpointing_is_on_where_its_section_is():
    assert read_settings({"activation_checkpointing": {}}).activation_checkpointing
    assert read_settings({"pipeline": {"activation_checkpoint_interval": 1}}).activation_checkpointing
    assert not read_settings({"activation_checkpointing": None}).activation_checkpointing
    assert "activation_checkpointing" in reconcile(make_recipe(), {"activation_checkpointing": {}}, Layout(1, 1))


def test_a_scheduler_of_the_jsons_own_is_kept_and_filled():
    params = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto"}
    ds = {"scheduler": {"type": "WarmupDecayLR", "params": params}}
    resolved = reconcile(make_recipe(optimizer={"lr": 2e-3}), ds, Layout(1, 1))
    fill_scheduler(resolved, 100, 5)
    filled = {"warmup_min_lr": 0.0, "warmup_max_lr": 2e-3, "warmup_num_steps": 5, "total_num_steps": 100}
    assert resolved["scheduler"] == {"type": "WarmupDecayLR", "params": filled}
    resolved["scheduler"]["params"]["cycle_min_lr"] = "auto"
    with pytest.raises(UserError, match=r"scheduler.params.cycle_min_lr cannot be derived"):
        fill_scheduler(resolved, 100, 5)
