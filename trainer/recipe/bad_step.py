"""`on_bad_step` of a recipe: what becomes of a step that went wrong, and what counts as one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer, model_validator

from .fields import Count, Section

BadStepName = Literal["stop", "skip", "rewind"]


class OnBadStep(Section):
    type: BadStepName = "stop"
    """stop; skip the update; or rewind to the last checkpoint. Samples that are left out stay out from then on."""
    spike: float | None = Field(default=None, gt=0)
    """A loss so many robust deviations above the median of the last `window` steps is bad, too. Not for skip."""
    window: Annotated[Count, Field(ge=8)] = 128
    """Steps that a spike is measured against; none is looked for before so many have been taken."""
    leave_out: Count = 1
    """rewind only: how many steps' samples are left out, the last of them the bad step's."""

    @model_validator(mode="after")
    def _options_are_used(self) -> OnBadStep:
        if self.spike is not None and self.type == "skip":
            raise ValueError("spike: a loss is known when its update has been made, too late to skip it; use rewind")
        if "window" in self.model_fields_set and self.spike is None:
            raise ValueError("window is of spike, which is not stated")
        if "leave_out" in self.model_fields_set and self.type != "rewind":
            raise ValueError(f"leave_out is of rewind; {self.type} leaves out no other steps than the bad one")
        return self

    @model_serializer(mode="plain")
    def _as_stated(self) -> Any:
        """As it may be written in a recipe: the type alone, where nothing else is stated."""
        options: dict[str, Any] = {} if self.spike is None else {"spike": self.spike, "window": self.window}
        if self.leave_out > 1:
            options["leave_out"] = self.leave_out
        return {"type": self.type, **options} if options else self.type


def as_type(value: Any) -> Any:
    """A name is short for a mapping without options."""
    return {"type": value} if isinstance(value, str) else value
