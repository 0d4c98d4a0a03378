"""What torch allocates on the CPU, as its profiler saw it: also what the inside of an operation makes."""

from __future__ import annotations

from collections.abc import Callable


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that was held at once of what `run` allocated; what it freed of older memory does not count."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the profiler saw no memory"
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
