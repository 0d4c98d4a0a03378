"""Held-out loss, perplexity and bits per byte of a plain Hugging Face model, in one process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data_prep.errors import UserError
from ...data_prep.making.bars import Told, untold
from ..objectives.base import Objective
from ..objectives.registry import objective_of
from .baselines import Entropies, HeldOut
from .breakdown import Breakdown
from .text_bytes import byte_lengths

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.batches import Batch
    from ..data.samples import Samples, Windows
    from ..recipe.recipe import Recipe

ENTROPY_TOKENS = 100_000_000  # of the training split, counted for the yardsticks: more would change little
READ_TOKENS = 1 << 20
LOGIT_BYTES = 256 << 20  # of one micro batch, in fp32


@dataclass(frozen=True)
class EvalResult:
    """The mean of an objective over held-out data: for language modelling, nats per predicted token."""

    loss: float
    tokens: int  # predicted
    bytes_per_token: float | None = None  # UTF-8 bytes of text per predicted token
    metrics: Mapping[str, float] = field(default_factory=dict)  # the objective's own
    per_token: bool = True  # whether the loss is nats per token

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """What the model pays per byte of text: comparable between tokenizers."""
        return None if not self.bytes_per_token else self.loss / math.log(2) / self.bytes_per_token

    def record(self) -> dict[str, Any]:
        """The fields of an eval record."""
        text = {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte} if self.per_token else {}
        return {"loss": self.loss, **text, "eval_tokens": self.tokens, **self.metrics}

    def __str__(self) -> str:
        parts = [f"loss {self.loss:.4f}"]
        if self.per_token:
            bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
            parts.append(f"perplexity {self.perplexity:.2f}{bits}")
        parts += [f"{name} {value:.4f}" for name, value in self.metrics.items()]
        return f"{', '.join(parts)} ({self.tokens:,} tokens)"


@dataclass(frozen=True)
class HeldOutData:
    """What a model is evaluated on."""

    name: str  # "valid split of data/corpus"
    samples: Sequence[Samples]
    train: Sequence[Windows]  # empty where the training data is not known, or holds records
    global_batch: int
    tokenizer: Path | None
    objective: Objective = field(default_factory=lambda: objective_of("causal_lm"))
    initial: str | None = None  # the model before the run, which preferences are compared with; None: not known

    @property
    def seq_len(self) -> int:
        """Of all its samples."""
        return self.samples[0].seq_len


@dataclass(frozen=True)
class Evaluation:
    """An evaluation in one process, with its yardsticks."""

    data: str
    result: EvalResult
    bytes_are_exact: bool
    entropies: Entropies | None
    breakdown: Breakdown | None = None  # where the loss is nats per token


def token_bytes(tokenizer: str | Path | None, samples: Sequence[Samples], vocab_size: int) -> np.ndarray | None:
    """UTF-8 bytes of the text of each token: exact integers for a byte-level tokenizer, else the stores' mean.

    Args:
        tokenizer: a Hugging Face folder; None: that of the first store.

    Returns:
        [vocab_size], int64 where exact, else float64; None where the stores do not record their text either.
    """
    folder = tokenizer or (samples[0].part.store.tokenizer if samples else None)
    exact = byte_lengths(Path(folder), vocab_size) if folder else None
    if exact is not None:
        return exact
    mean = mean_bytes(samples)
    return None if mean is None else np.full(vocab_size, mean)


def mean_bytes(samples: Sequence[Samples]) -> float | None:
    """UTF-8 bytes per token over the whole stores behind `samples`; None where a store does not record its text."""
    stores = {own.part.store.fingerprint: own.part.store for own in samples}.values()
    counts = [store.text_bytes for store in stores]
    if not counts or None in counts:
        return None
    return sum(count or 0 for count in counts) / sum(store.num_tokens for store in stores)


def evaluate_model(
    model: Any,
    data: HeldOutData,
    batches: int | None,
    told: Told = untold,
) -> Evaluation:
    """Mean loss of a plain Hugging Face model over the samples of a split, unshuffled.

    Args:
        batches: global batches to evaluate; None: the whole split.
        told: how many sequences have been.

    Raises:
        UserError: nothing to evaluate on, or a token id beyond the model's vocabulary.
    """
    vocab_size, breakdown = model.config.vocab_size, Breakdown(data.samples)
    check_context(model, data.seq_len)
    lengths, held_out = token_bytes(data.tokenizer, data.samples, vocab_size), HeldOut(vocab_size)
    objective, sums = data.objective, np.zeros(1 + len(data.objective.metrics))
    weight, tokens, text_bytes, done = 0.0, 0, 0.0, 0
    total = sum(map(len, data.samples))
    total = total if batches is None else min(total, batches * data.global_batch)
    rows = min(32, max(1, LOGIT_BYTES // (4 * data.seq_len * vocab_size)))
    for batch in held_out_batches(data, batches, rows, vocab_size):
        ids, labels = batch.input_ids.numpy(), batch.labels.numpy()
        nats = nats_of(model, batch)
        sums += loss_sums(model, batch, objective, nats)
        breakdown.add(batch, nats.cpu().numpy())
        weight, tokens = weight + objective.weight(batch), tokens + batch.tokens
        held_out.add(ids, labels)
        if lengths is not None:
            text_bytes += float(lengths[labels[labels >= 0]].sum())
        done = min(total, done + len(ids))
        told(done, total)
    if not weight:
        raise UserError(f"{data.name}: no token to evaluate on: it holds less than one sample of {data.seq_len} tokens")
    loss, *metrics = (sums / weight).tolist()
    per_token = text_bytes / tokens if lengths is not None and objective.per_token else None
    named = dict(zip(objective.metrics, metrics, strict=True))
    exact = lengths is not None and lengths.dtype == np.int64
    result = EvalResult(loss, tokens, per_token, named, objective.per_token)
    if not objective.per_token:
        return Evaluation(data.name, result, exact, None)
    return Evaluation(data.name, result, exact, yardsticks(held_out, data.train), breakdown)


def held_out_batches(data: HeldOutData, batches: int | None, rows: int, vocab_size: int) -> Iterator[Batch]:
    """Micro batches, of at most `rows`, of the first global batches: the samples that the training run evaluates on."""
    from ..data.batches import BatchShape, evaluation_batches
    from ..ranks.ranks import Ranks

    micro = max(n for n in range(1, rows + 1) if data.global_batch % n == 0)
    accumulation = data.global_batch // micro
    cut = micro, accumulation, data.global_batch, data.seq_len, vocab_size
    shape = BatchShape(*cut, collate=data.objective.collate)
    return evaluation_batches(data.samples, shape, Ranks(), batches)


def loss_sums(model: Any, batch: Batch, objective: Objective, nats: Tensor) -> np.ndarray:
    """The objective's loss and metrics summed over a batch, of whose labels the model needs so many `nats`."""
    found = objective.loss(batch.to(model.device), nats)
    return np.array([float(found.sum), *(float(found.metrics[name]) for name in objective.metrics)])


def nats_of(model: Any, batch: Batch) -> Tensor:
    """Cross entropy of every label of a batch on the model's device, [rows, time], 0 where there is none."""
    import torch
    import torch.nn.functional as F

    from ..data.labels import IGNORE

    batch = batch.to(model.device)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        flat = logits.flatten(0, 1).float()
        losses = F.cross_entropy(flat, batch.labels.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.double().view(batch.labels.shape)


def compared(data: HeldOutData, reference: Any) -> HeldOutData:
    """The data of a preference objective with the log-probabilities that a reference model gives its texts."""
    from ..data.samples import Packs
    from ..objectives.dpo import text_sums

    samples = []
    for packs in data.samples:
        assert isinstance(packs, Packs)
        found = np.zeros((len(packs.lengths), 2), np.float32)
        for batch in held_out_batches(replace(data, samples=[packs]), None, 8, reference.config.vocab_size):
            numbers = batch.extras["numbers"].numpy()
            sums = text_sums(batch.to(reference.device), -nats_of(reference, batch))
            found[numbers // 2, numbers % 2] = sums.cpu().numpy()
        samples.append(replace(packs, reference=found))
    return replace(data, samples=samples)


def check_context(model: Any, seq_len: int) -> None:
    """UserError where sequences are longer than the model's positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise UserError(f"sequences of {seq_len} tokens are longer than the model's context of {limit}; use --seq-len")


def yardsticks(held_out: HeldOut, train: Sequence[Windows]) -> Entropies | None:
    """Unigram and bigram cross entropies of the held-out tokens; of each training store an equal share is counted."""
    if not train:
        return None
    share = ENTROPY_TOKENS // len(train)
    return held_out.entropies(stream(windows, share) for windows in train)


def stream(windows: Windows, limit: int) -> Iterator[np.ndarray]:
    """The first `limit` tokens of a part of a store, piece by piece."""
    part = windows.part
    stop = min(part.stop, part.start + limit)
    for start in range(part.start, stop, READ_TOKENS):
        yield part.store.read(start, min(start + READ_TOKENS, stop))


def run_data(recipe: Recipe, split: str, tokenizer: Path | None, global_batch: int) -> HeldOutData:
    """The valid or test split of a run's recipe, and its training split for the yardsticks."""
    from ..data.samples import Windows, open_samples

    samples = [own for own in open_samples(recipe, split) if len(own)]  # type: ignore[arg-type]
    if not samples:
        raise UserError(
            f"data: the recipe has no {split} split of at least one sample of {recipe.data.seq_len} tokens "
            f"(data.split {recipe.data.split!r}); name a store with --store, or another --split"
        )
    train = [own for own in open_samples(recipe, "train") if isinstance(own, Windows) and len(own)]
    stores = ", ".join(dict.fromkeys(str(own.part.store.path) for own in samples))
    name, objective = f"{split} split of {stores}", objective_of(recipe.objective)
    initial = None if recipe.model.init == "random" else recipe.model.init
    return HeldOutData(name, samples, train, global_batch, tokenizer, objective, initial)


def store_data(path: str, seq_len: int, tokenizer: Path | None, recipe: Recipe | None = None) -> HeldOutData:
    """A whole store to evaluate on; as a run's recipe says, where it is one that the run could have learnt from."""
    from ..data.samples import samples_of
    from ..data.splits import whole_part
    from ..recipe.sources import WeightedStore

    part = whole_part(WeightedStore(store=path))
    kind, mask, packing, initial = part.store.kind, False, None, None
    objective = objective_of("causal_lm" if kind == "text" else kind)
    if recipe is not None and objective_of(recipe.objective).reads == kind:
        mask, packing, objective = recipe.data.document_mask, recipe.data.packing, objective_of(recipe.objective)
        initial = None if recipe.model.init == "random" else recipe.model.init
    samples = samples_of(part, seq_len, mask, packing)
    return HeldOutData(str(path), [samples], [], 8, tokenizer or part.store.tokenizer, objective, initial)


def evaluation_text(evaluation: Evaluation) -> str:
    """A few lines for people."""
    result, entropies = evaluation.result, evaluation.entropies
    lines = [f"{evaluation.data}: {result.tokens:,} predicted tokens"]
    lines.append(f"  loss           {result.loss:.4f}{' nats per token' if result.per_token else ''}")
    if result.per_token:
        lines.append(f"  perplexity     {result.perplexity:.2f}")
    lines += [f"  {name:<14} {value:.4f}" for name, value in result.metrics.items()]
    if result.bits_per_byte is not None:
        how = "" if evaluation.bytes_are_exact else ", from the store's mean bytes per token"
        lines.append(f"  bits per byte  {result.bits_per_byte:.4f} ({result.bytes_per_token:.3f} bytes per token{how})")
    if entropies is not None:
        lines += [
            f"  to compare, the same tokens under counts of {entropies.train_tokens:,} tokens of the train split:",
            f"  unigram        {entropies.unigram:.4f} (add-one smoothing)",
            f"  bigram         {entropies.bigram:.4f} (interpolated with the unigram, best strength)",
        ]
    return "\n".join(lines)


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """What `eval --json` prints."""
    entropies = evaluation.entropies
    record = {"data": evaluation.data, **evaluation.result.record(), "bytes_are_exact": evaluation.bytes_are_exact}
    if entropies is not None:
        record |= {"unigram_entropy": entropies.unigram, "bigram_entropy": entropies.bigram}
        record["entropy_train_tokens"] = entropies.train_tokens
    return record
