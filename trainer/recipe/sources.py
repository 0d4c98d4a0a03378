"""`data` of a recipe: the stores, their shares, and how they are cut into samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Literal

from pydantic import Field, model_validator

from .fields import Count, Place, Section, split_shares


class WeightedStore(Section):
    store: Place
    """A token store, or a bare Megatron prefix."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the mixture, relative to the other sources."""
    license: str | None = None
    """Of the texts, such as CC-BY-SA-4.0: for the model card."""


def source_names(stores: Sequence[WeightedStore]) -> tuple[str, ...]:
    """What the sources of a mixture are called where people look at them: the shortest that tells them apart."""
    paths = [str(own.store) for own in stores]
    short = [PurePath(path).name for path in paths]
    if len(set(short)) == len(short):
        return tuple(short)
    if len(set(paths)) == len(paths):
        return tuple(paths)
    return tuple(f"{path} #{number}" for number, path in enumerate(paths, 1))


class Data(Section):
    train: list[WeightedStore] = Field(min_length=1)
    """The stores to train on."""
    valid: list[WeightedStore] | None = Field(default=None, min_length=1)
    """Stores of their own for validation; replaces `split`."""
    test: list[WeightedStore] | None = Field(default=None, min_length=1)
    """Stores of their own for testing; replaces `split`."""
    split: str = "949,50,1"
    """Shares of the documents of `train` for train, valid and test, in this order."""
    seq_len: Count = 1024
    """Tokens of one sample."""
    document_mask: bool = False
    """Whether attention stops at document boundaries. It always does between records."""
    packing: Literal["best_fit", "none"] | None = None
    """Of records: several in a sample as they fit best (best_fit, if left out), or one in each (none)."""

    @model_validator(mode="after")
    def _one_source_of_validation(self) -> Data:
        split_shares(self.split)
        own = [key for key in ("valid", "test") if getattr(self, key) is not None]
        if own and "split" in self.model_fields_set and split_shares(self.split)[1:] != (0, 0):
            raise ValueError(f"split and {' and '.join(own)} are both stated; keep one")
        return self

    @property
    def shares(self) -> tuple[float, float, float]:
        """Shares of the train stores' documents that go to train, valid and test."""
        return split_shares(self.split) if self.valid is None and self.test is None else (1, 0, 0)
