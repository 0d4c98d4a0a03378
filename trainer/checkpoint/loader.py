"""Loading checkpoints of any layout into a live engine of any other, each rank reading what it needs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ...data_prep.errors import UserError
from ..ranks.ranks import Ranks
from .boxes import Box, Piece, Shape, pieces
from .deepspeed_scalars import write_scalars
from .deepspeed_state import Holding, Live, create_state, holdings, kinds_of, refresh_model, whole_states
from .folder import CHECKPOINTS, clear_leftovers, steps_in_sight
from .reader import Checkpoint
from .sharing import reading_shares

_DOING = "cannot read the checkpoint"


@torch.no_grad()
def load(live: Live, source: Path | Checkpoint) -> dict[str, Any]:
    """Puts a checkpoint into a live engine of any layout and returns the state that was saved with it. Collective.

    Args:
        live: its parameters must be those that the checkpoint holds, no more and no fewer.
        source: a checkpoint that has been verified, as `resolve_resume` gives it; or the path of one, of which every
            byte is then compared with the manifest before anything is loaded.

    Raises:
        UserError: on every rank: the checkpoint is damaged, or of another model.
    """
    if isinstance(source, Path):
        if problems := _shared_problems(source, live.ranks):
            raise UserError(f"damaged checkpoint: {'; '.join(problems)}. Restore it, or resume from an older one")
        source = Checkpoint(source)
    saved = source.state["engine"]
    _check_model(source, live)
    create_state(live.engine, saved["kinds"], saved["scalars"])
    held = holdings(live)
    filled = [*held, *whole_states(live)]
    live.ranks.together(lambda: _fill(source, filled, live.ranks), _DOING, source.path)
    refresh_model(live.engine, held)
    write_scalars(live.engine, saved)
    return source.state


def _fill(checkpoint: Checkpoint, held: Sequence[Holding], ranks: Ranks) -> None:
    for holding in held:
        own = pieces(holding.spec, *ranks.along(holding.spec.axis)[:2], holding.start, holding.stop)
        for kind, view in holding.views.items():
            if sum(piece.box.numel for piece in own) < view.numel():
                view.zero_()  # padded vocabulary rows
            for piece in own:
                checkpoint.read_into(holding.name, kind, piece.box, partial(_target, holding, kind, piece))


def _target(holding: Holding, kind: str, piece: Piece, box: Box) -> Tensor:
    """Where a box of a piece goes in what the engine trains on."""
    return holding.view(kind, box.moved(piece.box.offset, piece.local.offset))


def _check_model(checkpoint: Checkpoint, live: Live) -> None:
    """Refuses a checkpoint of other parameters, before anything is touched. Collective."""
    ranks = live.ranks
    mine = {name: p.spec.shape for name, p in live.parameters}  # type: ignore[attr-defined]
    mine |= {name: tuple(buffer.shape) for name, buffer in live.buffers}
    wanted = {name for names in ranks.gather_over_stages(list(mine)) for name in names}
    own_kinds = kinds_of((p for _, p in live.parameters), checkpoint.state["engine"]["kinds"])
    trained = {name: own_kinds(p) for name, p in live.parameters if p.requires_grad}

    def check() -> None:
        _refuse_others(checkpoint, mine, wanted)
        _refuse_untrained(checkpoint, trained)

    ranks.together(check, _DOING, checkpoint.path)


def _refuse_others(checkpoint: Checkpoint, mine: Mapping[str, Shape], wanted: set[str]) -> None:
    """UserError where the names stored are not those wanted by all stages, or a shape is not that of this one."""
    stored = set(checkpoint.names())
    problems = [f"{name} is not in the checkpoint" for name in sorted(wanted - stored)]
    problems += [f"{name} is not in the model" for name in sorted(stored - wanted)]
    problems += [
        f"{name} is {list(checkpoint.shape(name))} in the checkpoint and {list(shape)} in the model"
        for name, shape in sorted(mine.items())
        if name in stored and checkpoint.shape(name) != tuple(shape)
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{checkpoint.path}: a checkpoint of another model: {'; '.join(problems[:5])}{more}")


def _refuse_untrained(checkpoint: Checkpoint, trained: Mapping[str, Sequence[str]]) -> None:
    """UserError where a trained parameter's moments are missing: zeros in their place would change the run unsaid. None
    are before the first step.
    """
    lacking = [
        (name, gone) for name, kinds in trained.items() if (gone := sorted(set(kinds) - set(checkpoint.kinds(name))))
    ]
    if lacking:
        name, gone = lacking[0]
        more = f", nor of {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UserError(
            f"{checkpoint.path}: holds no {' and no '.join(gone)} of {name}{more}, which is trained here and was "
            "frozen, or another optimizer's, when it was saved; start from its weights with model.init"
        )


def _shared_problems(path: Path, ranks: Ranks) -> list[str]:
    """What is wrong with a checkpoint; the ranks share the reading and all get the same answer. Collective.

    Rank 0 alone looks at the manifest and at every file's size.
    """
    dealt = ranks.together(lambda: reading_shares(path, ranks.world) if ranks.is_main else None, _DOING, path)
    own = ranks.deal(dealt)
    return ranks.union(ranks.together(own.problems, _DOING, path))


def resolve_resume(output: Path, resume: str, ranks: Ranks) -> Checkpoint | None:
    """The checkpoint to resume from, every byte of it verified; None for a fresh start. Collective.

    Args:
        output: the run directory.
        resume: `auto` (newest whole one of the run directory, if it has any), `never`, or a path to a checkpoint, a
            `checkpoints/` folder or a run directory.

    Raises:
        UserError: there are checkpoints but none is whole, or the path holds none.
    """
    if resume == "never":
        return None
    if resume != "auto":
        return newest_shared(Path(resume), ranks, "resume: ")
    folder = output / CHECKPOINTS  # this run's own; another's may be alive
    ranks.together(lambda: clear_leftovers(folder) if ranks.is_main else None, _DOING, output)
    return newest_shared(output, ranks, "resume: ", or_none=True)


@overload
def newest_shared(root: Path, ranks: Ranks, what: str, or_none: Literal[False] = False) -> Checkpoint: ...
@overload
def newest_shared(root: Path, ranks: Ranks, what: str, or_none: bool) -> Checkpoint | None: ...
def newest_shared(root: Path, ranks: Ranks, what: str, or_none: bool = False) -> Checkpoint | None:
    """The newest whole checkpoint at `root`, every byte of it verified, for which the ranks share the reading.

    Collective.

    Args:
        what: begins the messages: which key of the recipe names it.
        or_none: whether there may be no checkpoint at all.

    Raises:
        UserError: on every rank: there are checkpoints but none is whole, or none.
    """
    candidates = ranks.of_main(ranks.together(lambda: steps_in_sight(root) if ranks.is_main else None, _DOING, root))
    if not candidates and not or_none:
        raise UserError(f"{what}{root} holds no checkpoint (expected a run directory or a step-… folder)")
    damaged: list[str] = []
    for path in candidates:
        problems = _shared_problems(path, ranks)
        if not problems:
            for line in damaged if ranks.is_main else []:
                print(f"warning: damaged checkpoint: {line}; {what}taking {path.name}", file=sys.stderr, flush=True)
            return ranks.together(lambda path=path: Checkpoint(path), _DOING, path)
        damaged.append("; ".join(problems))
    if damaged:
        advice = "Restore one" + (", or start afresh with resume: never" if what == "resume: " else "")
        raise UserError(f"{what}no whole checkpoint in {root}: {'; '.join(damaged)}. {advice}")
    return None
