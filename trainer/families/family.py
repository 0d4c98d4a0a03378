"""The written record of a model family: all that the product knows of it. One file a family makes one. Needs no torch.

What transformers declares of a family is enough for every layout (`derived.py`). A written record plans without torch,
draws initial values of its own and names the norms that feed split linears, which saves reductions. Most of its fields
can be read off there too:

    defaults                  fields of the configuration class
    aliases                   its `attribute_map`
    embedding, blocks, norm   keys of `base_model_pp_plan` behind `base_model_prefix`
    styles                    `base_model_tp_plan` without "layers.*."
    block                     shapes of the first block on the meta device

`feeds`, `attention`, `mlp` and the formulas of bytes are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..recipe.precision import Precision
from ..recipe.text_files import words
from .param_spec import ParamSpec, Split, norm

Config = Mapping[str, Any]  # transformers' own names
Style = Literal["colwise", "packed_colwise", "rowwise"]  # packed: fused queries, keys and values
HeadCount = Literal["heads", "groups", "width"]  # query heads; query heads of each key head; width of the queries

# keys that transformers takes for any family
COMMON = words(
    """
    model_type vocab_size bos_token_id eos_token_id pad_token_id tie_word_embeddings initializer_range use_cache
    architectures dtype torch_dtype transformers_version _name_or_path id2label label2id return_dict
    output_hidden_states output_attentions is_encoder_decoder problem_type chunk_size_feed_forward
    """
)


@dataclass(frozen=True)
class Attention:
    """The attention of a block: its projections by names relative to the block, all in one module.

    Fused projections are one name three times.
    """

    query: str
    key: str
    value: str
    output: str
    counts: Mapping[str, HeadCount]  # attributes of the module that depend on how many heads a rank has

    @property
    def fused(self) -> bool:
        """Whether query, key and value are one linear."""
        return self.query == self.key

    @property
    def projections(self) -> tuple[str, ...]:
        return self.query, self.key, self.value, self.output


@dataclass(frozen=True)
class Family:
    """A family of causal language models.

    Raises:
        ValueError: a column-parallel linear for which no module is named that feeds it.
    """

    defaults: Mapping[str, Any]  # of every key of the configuration; COMMON ones only where the table needs them
    embedding: str
    blocks: str
    norm: str  # the last one
    block: Callable[[Config], list[ParamSpec]]  # of one block, by relative names, unsplit; takes all keys
    styles: Mapping[str, Style]  # of linears, by relative names
    feeds: Mapping[str, tuple[str, ...]]  # module whose output enters split linears → which of them; relative names
    attention: Attention
    block_bytes: Callable[[Config, Precision, int], float]  # kept for backward by a block per token, of tensor ranks
    mlp: str | None = None  # name in a block of what treats each token by itself, from one tensor to one of its shape
    mlp_bytes: Callable[[Config, Precision, int], float] | None = None  # of block_bytes: kept there beyond its input
    aliases: Mapping[str, str] = field(default_factory=dict)  # standard names → the family's own
    extra_keys: frozenset[str] = frozenset()  # that the configuration takes without a field of that name
    positions: str | None = None  # learnt position embeddings, if any
    norm_bias: bool = False
    norm_bytes: int = 0  # kept by the last norm per number, beyond its input and its output
    conv: bool = False  # whether linears are Conv1D
    dropout: Mapping[str, str] = field(default_factory=dict)  # embedding | attention | residual → key
    shape: tuple[float, float] | None = (1.0, 0.0)  # scale and cap of the logits; see `Derived`
    head: str = "lm_head"
    pads: bool = True  # whether the vocabulary can be padded
    by_text: bool = True  # whether all that attention need know of a row is where its texts begin
    # parameters whose gradient is only rounding noise, by relative names → which of their parts
    noise: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fed = {name for names in self.feeds.values() for name in names}
        columns = {name for name, style in self.styles.items() if style != "rowwise"}
        if lacking := sorted(columns ^ fed):
            raise ValueError(f"feeds must name what each column-parallel linear is fed by, and only those: {lacking}")

    @property
    def keys(self) -> frozenset[str]:
        """Keys that the configuration knows, aliases left out."""
        return COMMON | self.extra_keys | frozenset(self.defaults)

    def key(self, standard: str) -> str:
        """The family's own name of a key that transformers also knows by a standard one."""
        return self.aliases.get(standard, standard)

    def value(self, config: Config, standard: str) -> Any:
        """What a configuration says, or else transformers' default."""
        value = config.get(self.key(standard))
        return self.defaults.get(self.key(standard)) if value is None else value

    def complete(self, config: Config) -> dict[str, Any]:
        """The configuration with the defaults of what it leaves out."""
        return {**self.defaults, **{key: value for key, value in config.items() if value is not None}}

    def table(self, config: Config, padded_rows: int) -> list[ParamSpec]:
        """Rows of all parameters in Hugging Face's order, tied ones once."""
        full, width = self.complete(config), self.value(config, "hidden_size")
        std = full["initializer_range"]
        vocab = ParamSpec("", (config["vocab_size"], width), "vocab", Split(0), std=std, padded_rows=padded_rows)
        specs = [replace(vocab, name=f"{self.embedding}.weight")]
        if self.positions is not None:
            longest = self.value(config, "max_position_embeddings")
            specs.append(ParamSpec(f"{self.positions}.weight", (longest, width), "replicated", std=std))
        block = [self._classified(spec, config) for spec in self.block(full)]
        for layer in range(self.value(config, "num_hidden_layers")):
            specs += [replace(spec, name=f"{self.blocks}.{layer}.{spec.name}", layer=layer) for spec in block]
        specs += [replace(spec, kind="feeding") for spec in norm(self.norm, width, self.norm_bias)]
        if not full["tie_word_embeddings"]:
            specs.append(replace(vocab, name="lm_head.weight"))
        return specs

    def _classified(self, spec: ParamSpec, config: Config) -> ParamSpec:
        """A row of a block with its kind and its split."""
        module, _, leaf = spec.name.rpartition(".")
        style = self.styles.get(module)
        if style is None:
            return replace(spec, kind="feeding") if module in self.feeds else spec
        if style == "rowwise" and leaf == "bias":
            return replace(spec, kind="replicated")
        kind, out = ("row", 1) if style == "rowwise" else ("column", 0)
        dim = 0 if leaf == "bias" else 1 - out if self.conv else out
        head = self.head_size(config) if module in self.attention.projections else 1
        parts = (spec.shape[dim] // 3,) * 3 if style == "packed_colwise" else None
        return replace(spec, kind=kind, split=Split(dim, parts, head))

    def head_size(self, config: Config) -> int:
        """Width of one attention head."""
        return config.get("head_dim") or self.value(config, "hidden_size") // self.value(config, "num_attention_heads")

    def relative(self, spec: ParamSpec) -> str | None:
        """Name of a block's parameter within the block; None for one outside the blocks."""
        return None if spec.layer is None else spec.name.removeprefix(f"{self.blocks}.{spec.layer}.")
