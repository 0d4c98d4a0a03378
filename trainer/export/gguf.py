"""A model as one GGUF file, for llama.cpp and what is built on it; refused unless transformers reads it back as it was.

Families like Llama, with a byte-level BPE tokenizer. Matrices are f16 or q8_0 (32 weights with one f16 scale), vectors
f32, all from the fp32 weights of the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...data_prep.errors import UserError
from .published import PublishedWeights

GgufType = Literal["f16", "q8_0"]
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # by model_type
# llama.cpp knows how a tokenizer splits text before BPE by a name: of the regular expression, or of what is there
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
_LAST_OF_ROUNDING = 1.001  # the scale is a rounded f16, too


def add_gguf(folder: Path, weights: PublishedWeights, config: Mapping[str, Any], kind: GgufType) -> None:
    """Writes model-KIND.gguf beside an exported model, and verifies it. Raises as `write_gguf` and `verify_gguf`."""
    path = folder / f"model-{kind}.gguf"
    write_gguf(path, weights, config, folder, kind)
    verify_gguf(path, weights, kind)


def write_gguf(path: Path, weights: PublishedWeights, config: Mapping[str, Any], folder: Path, kind: GgufType) -> None:
    """Writes the file, holding one parameter at a time.

    Args:
        config: transformers' configuration of the model, as a mapping.
        folder: the exported model, with its tokenizer and generation_config.json.

    Raises:
        UserError: the `gguf` package is missing, or GGUF has no words for this model or tokenizer.
    """
    gguf = _library()
    full = _full_config(config)
    refuse_unlike(full)
    tokenizer = _tokenizer(folder)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[full.model_type])
    _write_config(writer, full, kind)
    _write_tokenizer(writer, tokenizer, full.vocab_size, folder)
    names = gguf.get_tensor_name_map(_architecture(gguf, full), full.num_hidden_layers)
    for name in weights.names():
        writer.add_tensor_info(_gguf_name(names, name), *_encoded(kind, weights.shape(name)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in weights.names():
        writer.write_tensor_data(_tensor(kind, _rotated(name, weights.read(name), full)))
    writer.close()


def refuse_unlike(config: Any) -> None:
    """UserError for what GGUF, or transformers' reader of it, has no words for."""
    kind, rope = config.model_type, (config.rope_parameters or {}) if hasattr(config, "rope_parameters") else {}
    if kind not in ARCHITECTURES:
        raise UserError(f"--gguf: cannot write {kind}; families that can be: {', '.join(ARCHITECTURES)}")
    reasons = {
        f"rope type {rope.get('rope_type')!r}": rope.get("rope_type", "default") != "default",
        "a head_dim other than 128, as transformers reads it": kind == "qwen3" and config.head_dim != 128,
        "biases": kind == "llama" and (config.attention_bias or config.mlp_bias),
        "a sliding window": bool(getattr(config, "sliding_window", None))
        and getattr(config, "use_sliding_window", True),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"--gguf: cannot write a {kind} with {reason}")


def verify_gguf(path: Path, weights: PublishedWeights, kind: GgufType) -> None:
    """Compares the model as transformers reads it from the file, in float32, tensor by tensor.

    f16 must be the rounded weight, bit for bit; of q8_0 no weight may be off by more than half a step, which is the
    largest weight of its 32 divided by 127, and what f16 takes from the step.

    Raises:
        UserError: a tensor is missing or is another.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    read = model.state_dict()
    for name in weights.names():
        if name not in read:
            raise UserError(f"{path}: transformers finds no {name} in it")
        worst = _excess(weights.read(name), read[name], kind)
        if not worst <= 0:
            raise UserError(f"{path}: {name} reads back other than it was written, by {worst:.3g} too much")


def _excess(wanted: Tensor, found: Tensor, kind: GgufType) -> float:
    """How much more than rounding allows the worst weight is off."""
    if wanted.shape != found.shape:
        return float("nan")
    off = (wanted - found).abs()
    if wanted.ndim == 1 or kind == "f16" or wanted.shape[-1] % 32:
        rounded = wanted if wanted.ndim == 1 else wanted.half().float()
        return float((rounded - found).abs().max())
    steps = wanted.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
    # of f16's own rounding: 2^-11 of a scale that is multiplied by up to 127; beneath its normal numbers, 2^-25
    allowed = steps / 2 * _LAST_OF_ROUNDING + 127 * (steps * 2**-11 + 2**-25)
    return float((off.reshape(-1, 32) - allowed).max())


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("--gguf needs the package gguf: pip install 'zeropipe[gguf]'") from None
    return gguf


def _full_config(config: Mapping[str, Any]) -> Any:
    from .load import hf_config

    return hf_config(dict(config))


def _architecture(gguf: Any, config: Any) -> Any:
    wanted = ARCHITECTURES[config.model_type]
    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)


def _gguf_name(names: Any, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UserError(f"--gguf: has no name for the parameter {name}")
    return found


def _write_config(writer: Any, config: Any, kind: GgufType) -> None:
    import gguf

    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(config.model_type)
    writer.add_file_type(getattr(gguf.LlamaFileType, {"f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}[kind]))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _tokenizer(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    except FileNotFoundError:
        raise UserError("--gguf: the file holds the tokenizer, and none was found for this run") from None
    if found["model"]["type"] != "BPE" or found["model"].get("byte_fallback"):
        raise UserError("--gguf: takes byte-level BPE tokenizers, and this run has another")
    return found


def pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json splits text before BPE.

    Raises:
        UserError: it has none that this program knows.
    """
    parts = tokenizer.get("pre_tokenizer") or {}
    parts = parts["pretokenizers"] if parts.get("type") == "Sequence" else [parts]
    kinds = [part.get("type") for part in parts]
    if kinds[-1] == "ByteLevel" and not parts[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]:
            return "smollm"
        pattern = parts[0].get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
        if pattern in _SPLITS:
            return _SPLITS[pattern]
    raise UserError(
        "--gguf: llama.cpp splits text before BPE by rules of its own, and those of this tokenizer "
        f"({', '.join(map(str, kinds))}) are none that have a name here"
    )


def _write_tokenizer(writer: Any, tokenizer: Mapping[str, Any], size: int, folder: Path) -> None:
    from gguf import TokenType

    kinds = {token["id"]: TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
             for token in tokenizer.get("added_tokens", ())}  # fmt: skip
    words = {number: word for word, number in tokenizer["model"]["vocab"].items()}
    words |= {token["id"]: token["content"] for token in tokenizer.get("added_tokens", ())}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list([words.get(number, f"[PAD{number}]") for number in range(size)])  # of a padded vocabulary
    unused = TokenType.UNUSED
    writer.add_token_types([kinds.get(n, TokenType.NORMAL if n in words else unused) for n in range(size)])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    generation = json.loads((folder / "generation_config.json").read_text())
    for key, add in (("bos_token_id", writer.add_bos_token_id), ("eos_token_id", writer.add_eos_token_id)):
        value = generation.get(key)
        if value is not None:
            add(value[0] if isinstance(value, list) else value)
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text("utf-8"))


def _rotated(name: str, tensor: Tensor, config: Any) -> Tensor:
    """llama.cpp's llama turns neighbouring rows of q and k, Hugging Face's the two halves of a head."""
    if ARCHITECTURES[config.model_type] != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape).contiguous()


def _tensor(kind: GgufType, tensor: Tensor) -> np.ndarray:
    from gguf import GGMLQuantizationType, quants

    if tensor.ndim == 1:
        return tensor.float().numpy()
    if kind == "q8_0" and tensor.shape[-1] % 32 == 0:
        return quants.quantize(tensor.float().numpy(), GGMLQuantizationType.Q8_0)
    return tensor.half().numpy()


def _encoded(kind: GgufType, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Shape, type and bytes of a tensor as it will be written, for `add_tensor_info`."""
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    if kind == "q8_0" and len(shape) > 1 and shape[-1] % 32 == 0:
        packed = quant_shape_to_byte_shape(shape, GGMLQuantizationType.Q8_0)
        return packed, np.dtype(np.uint8), int(np.prod(packed)), GGMLQuantizationType.Q8_0
    dtype = np.dtype(np.float32 if len(shape) == 1 else np.float16)
    return shape, dtype, int(np.prod(shape)) * dtype.itemsize
