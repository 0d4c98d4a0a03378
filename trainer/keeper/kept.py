"""The rank's side of its keeper: its last words, its stacks when they are asked for, the collective it waits in."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading

from .pulse import KEPT_FILES, kept_files

ASK_FOR_STACKS = signal.SIGQUIT
_PR_SET_PDEATHSIG = 1


def begin_kept(keeper: int, pulse: int, words: int, stacks: int, questions: int, answers: int, errors: int) -> None:
    """Makes this new process a rank that is looked after by process `keeper`; the rest are descriptors of files.

    It dies with its keeper. Its stacks go to a file, by a handler in C, so also where a collective blocks.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != keeper:  # it was gone before the line above
        os._exit(1)
    os.setsid()  # what it starts is ended with it, as its process group
    os.dup2(errors, 2)
    os.environ[KEPT_FILES] = f"{os.getpid()}:{pulse}:{words}"
    # collectives are noted, so that a rank can say which it waits in
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "256")
    faulthandler.enable(stacks)
    faulthandler.register(ASK_FOR_STACKS, stacks)
    threading.Thread(target=_answer, args=(questions, answers), daemon=True, name="zeropipe-answers").start()


def say_last(text: str, consequence: bool = False) -> None:
    """Why this rank ends: its keeper tells the launcher, which prints it last; without a keeper, stderr has it now.

    Args:
        consequence: whether another rank's end is what ended this one.
    """
    files = kept_files()
    if files is None:
        print(text, file=sys.stderr, flush=True)
        return
    os.ftruncate(files[1], 0)
    os.pwrite(files[1], json.dumps({"text": text, "consequence": consequence}).encode(), 0)


def _answer(questions: int, answers: int) -> None:
    """In a thread: a byte asks which collective this rank waits in, a line answers."""
    while os.read(questions, 1):
        try:
            waiting = _waiting_in()
        except Exception as error:  # torch's recorder is not public; what fails here must not take the rank with it
            waiting = {"unknown": f"{error}"}
        os.write(answers, json.dumps(waiting).encode() + b"\n")


def _waiting_in() -> dict:
    """The collective that torch's flight recorder holds for unfinished, the latest one; empty if there is none."""
    if "torch.distributed" not in sys.modules:
        return {}
    from torch._C import _distributed_c10d as c10d

    dump = getattr(c10d, "_dump_nccl_trace_json", None) or getattr(c10d, "_dump_fr_trace_json", None)
    if dump is None:
        return {"unknown": "this torch keeps no record"}
    record = json.loads(dump(includeCollectives=True, onlyActive=False))
    entries = [entry for entry in record.get("entries", []) if entry["state"] != "completed"]
    active = [entry for entry in entries if not entry["retired"]]
    if not active:
        return {}
    last = active[-1]
    return {
        "name": last["profiling_name"],
        "number": last["collective_seq_id"],
        "group": last["process_group"][-1],
        "sizes": last["input_sizes"],
    }
