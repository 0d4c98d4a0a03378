"""The records against what transformers itself says, and what is read from its source without importing it."""

from __future__ import annotations

from dataclasses import MISSING, fields

import pytest
from transformers import CONFIG_MAPPING

from zeropipe.trainer.families import declared
from zeropipe.trainer.families.declared import declared_keys
from zeropipe.trainer.families.registry import FAMILIES


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_record_says_what_transformers_says(name):
    family, theirs = FAMILIES[name], CONFIG_MAPPING[name]
    defaults = {f.name: f.default for f in fields(theirs) if f.default is not MISSING}
    assert {key: defaults[key] for key in family.defaults} == dict(family.defaults)
    assert family.aliases == theirs.attribute_map
    assert {f.name for f in fields(theirs)} <= family.keys
    plan = {key.removeprefix("layers.*."): style for key, style in (theirs.base_model_tp_plan or {}).items()}
    assert not plan or plan == family.styles
    prefix = family.blocks.partition(".")[0]
    stages = {f"{prefix}.{key}" for key in theirs.base_model_pp_plan or {}}
    assert not stages or stages == {family.embedding, family.blocks, family.norm}


@pytest.mark.parametrize("name", ["qwen3", "mistral", "olmo2", "gemma3_text", "qwen3_moe", "gpt_neox", "deepseek_v3"])
def test_keys_read_from_the_source_are_those_of_the_class(name):
    found = declared_keys(name)
    assert found is not None
    theirs = CONFIG_MAPPING[name]
    assert {f.name for f in fields(theirs)} | set(theirs.attribute_map) <= found
    assert not found & {"n_layer", "n_embd"}


def test_nothing_is_said_of_families_that_are_not_understood(monkeypatch):
    assert declared_keys("no_such_family") is None
    monkeypatch.setattr(declared, "find_spec", lambda name: None)
    monkeypatch.setattr(declared, "_configuration", declared._configuration.__wrapped__)  # which remembers
    assert declared_keys("qwen3") is None and declared.model_folders() == []
