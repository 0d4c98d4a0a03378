"""What a Hugging Face folder says of its model, and which file holds which parameter. Reads headers alone, and needs no
torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ...data_prep.errors import UserError, as_user_error
from .param_spec import ParamSpec


class WeightFiles:
    """The safetensors files of a folder.

    Raises:
        UserError: there is none (pickles are never opened), or one is damaged or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            pickles = sorted(p.name for p in folder.glob("*.bin"))
            found = f"only pickles ({', '.join(pickles)}), which can run code when opened" if pickles else "none"
            raise UserError(f"model.init: {folder} must hold *.safetensors; found {found}")
        self._shapes: dict[str, tuple[Path, tuple[int, ...]]] = {}
        for file in files:
            try:
                with safe_open(file, "np") as handle:
                    for key in handle.keys():  # noqa: SIM118 (not a mapping)
                        self._shapes[key] = file, tuple(handle.get_slice(key).get_shape())
            except SafetensorError as error:
                raise UserError(f"model.init: {file}: damaged or incomplete ({error}); fetch it again") from None
            except OSError as error:
                raise as_user_error(error, "model.init cannot be read", file) from error

    def find(self, name: str) -> tuple[Path, str]:
        """The file that holds a parameter, and its name there: the base model's files (GPT-2's own release) lack the
        head's prefix.

        Raises:
            UserError: none holds it.
        """
        for key in (name, name.partition(".")[2]):
            if key in self._shapes:
                return self._shapes[key][0], key
        raise UserError(f"model.init: {self.folder} holds no parameter {name}; is it the same model family?")

    def check(self, table: Iterable[ParamSpec]) -> None:
        """Finds out before anything is built what a single stage of a pipeline would stumble over.

        Raises:
            UserError: a parameter is missing, or has another shape.
        """
        for spec in table:
            file, key = self.find(spec.name)
            if (found := self._shapes[key][1]) != spec.shape:
                raise UserError(
                    f"model.init: {file}: {key} has the shape {list(found)}, config.json makes it {list(spec.shape)}"
                )


def refuse_own_code(config: Mapping[str, Any], file: Path) -> None:
    """UserError where a configuration names a model in code of its own. Such code is never run, nor does anything ask
    whether it may; transformers' model of that type may compute something else.
    """
    named = config.get("auto_map") or {}
    for kind in ("AutoModelForCausalLM", "AutoModel", "AutoConfig"):
        if kind in named:
            raise UserError(
                f"{file}: auto_map: its model is code of its own ({named[kind]}), which is never run; if transformers' "
                f"own {config.get('model_type')!r} computes the same, take auto_map out of the file"
            )
