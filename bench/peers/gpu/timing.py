"""Times a call on the GPU as `diffkv bench` does (bench/harness/meter.cc, src/device/): recorded as
a CUDA graph and launched from cold caches, timed by the GPU's clock round one launch."""

from __future__ import annotations

from collections.abc import Callable

import torch

_WARM_UPS = 3
FLUSH_BYTES = 256 << 20  # several times the caches of the largest GPU
_BUSY_CYCLES = 200_000  # about 0.1 ms


class Recording:
    """A call as a CUDA graph, or as it is where it cannot be recorded: `why_not` says so."""

    def __init__(self, call: Callable[[], object]):
        self.launch: Callable[[], object] = call
        self.why_not = ""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # What a first call compiles and allocates must not be part of the graph.
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        try:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                call()
            self.launch = self._graph.replay
        except Exception as error:  # whatever a peer raises in a capture
            torch.cuda.synchronize()
            self.why_not = f"cannot be recorded: {type(error).__name__}: {error}"


class Clock:
    """Times recordings; owns the memory that is written between two launches."""

    def __init__(self, repetitions: int):
        self._repetitions = repetitions
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self._flushes = 0
        self._marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def times(self, recording: Recording) -> list[float]:
        """Seconds of each repetition."""
        times = [self._once(recording) for _ in range(_WARM_UPS + self._repetitions)]
        return times[_WARM_UPS:]

    def empty_launch_seconds(self) -> float:
        """Of a graph with next to nothing in it: what the method itself adds to every time."""
        word = torch.zeros(1, device="cuda")
        times = sorted(self.times(Recording(word.zero_)))
        return times[len(times) // 2]

    def _once(self, recording: Recording) -> float:
        self._flushes = (self._flushes + 1) % 256
        self._flush.fill_(self._flushes)
        # The host queues the launch meanwhile.
        torch.cuda._sleep(_BUSY_CYCLES)
        self._marks[0].record()
        recording.launch()
        self._marks[1].record()
        self._marks[1].synchronize()
        return self._marks[0].elapsed_time(self._marks[1]) * 1e-3
