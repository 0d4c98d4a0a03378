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
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, "np") as handle:
                    for key in handle.keys():  # noqa: SIM118 (not a mapping)
                        self.shapes[key], self._file_of[key] = tuple(handle.get_slice(key).get_shape()), file
            except SafetensorError as error:
                raise UserError(f"model.init: {file}: damaged or incomplete ({error}); fetch it again") from None
            except OSError as error:
                raise as_user_error(error, "model.init cannot be read", file) from error

    def file_of(self, key: str) -> Path:
        """The file that holds a tensor."""
        return self._file_of[key]

    def lacks(self, name: str) -> UserError:
        """What to raise where a parameter is missing."""
        return UserError(f"model.init: {self.folder} holds no parameter {name}; is it the same model family?")

    def check(self, table: Iterable[ParamSpec], made: Mapping[str, tuple[int, ...]] | None = None) -> None:
        """Finds out before anything is built what a single stage of a pipeline would stumble over.

        Args:
            made: shapes of the parameters that transformers makes of the tensors; None: of a family whose tensors are
                its parameters.

        Raises:
            UserError: a parameter is missing, or has another shape.
        """
        for spec in table:
            key = self._key(spec.name) if made is None else spec.name
            where, shapes = (self.folder, made) if made is not None else (self._file_of[key], self.shapes)
            if key not in shapes:
                raise self.lacks(spec.name)
            if shapes[key] != spec.shape:
                raise UserError(
                    f"model.init: {where}: {key} has the shape {list(shapes[key])}, config.json makes it "
                    f"{list(spec.shape)}"
                )

    def _key(self, name: str) -> str:
        """What a parameter is called there: the base model's files (GPT-2's own release) lack the head's prefix."""
        for key in (name, name.partition(".")[2]):
            if key in self.shapes:
                return key
        raise self.lacks(name)


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


def refuse_quantised(config: Mapping[str, Any], file: Path) -> None:
    """UserError where a folder's weights are quantised: its tensors are worth nothing without their scales."""
    if stated := config.get("quantization_config"):
        how = stated.get("quant_method") if isinstance(stated, dict) else stated
        raise UserError(
            f"{file}: quantization_config: its weights are quantised ({how}), and training begins with plain ones; "
            "take a folder in bfloat16 or float32, or load it with transformers (dequantize) and save it"
        )
