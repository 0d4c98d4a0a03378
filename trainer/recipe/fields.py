"""Kinds of values in a recipe, as pydantic checks them."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A mapping of a recipe: strict and frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def _whole(value: Any) -> Any:
    """10e9 is a float in YAML; as a count it is a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def from_home(value: Any) -> Any:
    """No shell expands a ~ inside a recipe or after key=."""
    return os.path.expanduser(value) if isinstance(value, str) else value


Place = Annotated[str, Field(min_length=1), BeforeValidator(from_home)]
Count = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
CountOrNever = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _steps_or_fraction(value: Any) -> Any:
    """A whole number is steps, a fraction is of all steps; 1.0 could be meant as either."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(f"must be steps (a whole number) or a fraction of all steps, got {value!r}")
    if isinstance(value, float) and value >= 1:
        raise ValueError(f"a fraction of all steps is below 1, steps are whole numbers; got {value!r}")
    return value


def _name_or_mapping(value: Any) -> Any:
    """A name, or a mapping of type and options, which only what is named can check; without options it is the name."""
    name = value.get("type") if isinstance(value, dict) else value
    if not isinstance(name, str) or not name:
        raise ValueError(f"must be a name, or a mapping with the name as its type; got {value!r}")
    return name if value == {"type": name} else value


Choice = Annotated[str | dict[str, Any], BeforeValidator(_name_or_mapping)]
Steps = Annotated[int | float, BeforeValidator(_steps_or_fraction)]


def split_shares(split: str) -> tuple[float, float, float]:
    """The three shares of "949,50,1"; shares that are left out are 0.

    Raises:
        ValueError: not one to three non-negative numbers with a positive first.
    """
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(0 <= share < float("inf") for share in shares) or not shares[0]:
        raise ValueError(f"split must be shares of train, valid and test, such as '949,50,1'; got {split!r}")
    train, valid, test = [*shares, 0.0, 0.0][:3]
    return train, valid, test
