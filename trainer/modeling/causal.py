"""A Hugging Face causal LM that gives the loss of every token, and holds the logits of a chunk of them at most."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..families.derived import Derived
from ..families.family import Family
from ..families.registry import FAMILIES
from ..ranks.ranks import Ranks
from .attention import text_lengths
from .cross_entropy import Scoring, head_token_losses, token_losses, whole_logits
from .mixtures.routers import Routers
from .penalty import NO_PENALTY, Penalty


class CausalLM(nn.Module):
    """A Hugging Face causal LM with the cross entropy of its labels.

    Args:
        model: with `get_output_embeddings()`; its vocabulary may be padded beyond `vocab_size`.
        vocab_size: true vocabulary; the padding gets no probability.
        ranks: each tensor-parallel rank holds some columns of the logits.
        penalty: on every token in training.
        uniform, sparse: whether all tokens count alike, and whether many places carry no label.
        family: its record; None: that of the registry, if there is one.
        routers: those of a mixture of experts, whose part of the loss a training forward pass leaves in them.
    """

    def __init__(
        self,
        model: nn.Module,
        vocab_size: int,
        ranks: Ranks,
        penalty: Penalty = NO_PENALTY,
        uniform: bool = False,
        sparse: bool = False,
        family: Family | Derived | None = None,
        routers: Routers | None = None,
    ) -> None:
        super().__init__()
        self.penalty, self.uniform, self.sparse = penalty, uniform, sparse
        self.model: Any = model
        self.family: Any = family or FAMILIES.get(self.model.config.model_type)
        self.vocab_size = vocab_size
        self.ranks: Any = ranks
        self.routers = routers

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        """Nats of every label, 0 for `IGNORE`; without labels, the logits.

        Args:
            input_ids: [batch, time] int64.
            labels: [batch, time] int64: the token that follows each input token, or `IGNORE`.
            position_ids: [batch, time]; where they restart, attention does not look back. None: 0, 1, 2, … Best left
                on the host, where the texts' lengths are read from them.

        Returns:
            fp32 [batch, time], or logits [batch, time, vocab_size] in fp32.
        """
        family = self.family
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        if family is not None and family.by_text:  # of others, transformers knows what its mask must be
            inputs["attention_mask"] = text_lengths(position_ids)
        inputs["position_ids"] = None if position_ids is None else position_ids.to(input_ids.device, non_blocking=True)
        if labels is None:
            return whole_logits(self.model(**inputs).logits, self.vocab_size, self.ranks)
        if self.routers is None or not self.training:
            return self._losses(inputs, labels)
        with self.routers.listening():
            losses = self._losses(inputs, labels)
        self.routers.weigh(labels)
        return losses

    def _losses(self, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        family, columns = self.family, self.model.config.get_text_config().vocab_size
        scoring = Scoring(self.vocab_size, columns, self.ranks, self.penalty if self.training else NO_PENALTY)
        if family is None or family.shape is None:
            return token_losses(self.model(**inputs).logits, labels, scoring)
        scoring = replace(scoring, scale=family.shape[0], cap=family.shape[1])
        hidden = self.model.base_model(**inputs).last_hidden_state
        head = self.model.get_output_embeddings()
        return head_token_losses(head, hidden, labels, scoring, self.uniform, self.sparse)
