"""Times every operation of a real step, beside what it is charged in ``traffic.py``."""

import contextlib
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.module_tracker import ModuleTracker

from tools.lib.traffic import Counter, Traffic

# The GPU spins for this long before each operation, so that its start and end are queued before it begins and what the
# host takes is not measured: half a millisecond at 2 GHz.
CYCLES_AHEAD = 1_000_000


def time_step(
    network: nn.Module, images: torch.Tensor, training: bool, dtype: torch.dtype | None = torch.bfloat16, turns: int = 3
) -> Traffic:
    """A step's operations with the least seconds of several turns; the first step, which compiles, is not one of them.

    Args:
        network: on the device to measure, in the memory format and mode to measure it in.
        images: a batch (N, C, H, W) on that device, in the network's memory format.
        training: whether to measure the loss and the backward pass too.
        dtype: autocast's precision; None: no autocast.
        turns: how often each operation is timed.
    """
    _step(network, images, training, dtype, None)
    traffics = []
    for _ in range(turns):
        network.zero_grad(set_to_none=True)
        counter = _TimingCounter(images.device)
        _step(network, images, training, dtype, counter)
        traffics.append(counter.finish())
    for operations in zip(*(traffic.operations for traffic in traffics), strict=True):
        operations[0].seconds = min(op.seconds for op in operations)
    return traffics[0]


def _step(network, images, training, dtype, counter):
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # the backward pass in this thread too
        if counter:
            stack.enter_context(counter)
            counter.modules = stack.enter_context(ModuleTracker())
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None), torch.set_grad_enabled(training):
            y = network(images)
            loss = F.cross_entropy(y, torch.zeros(len(y), dtype=torch.long, device=y.device)) if training else None
        if training:
            if counter:
                counter.phase = "backward"
            loss.backward()


class _TimingCounter(Counter):
    def __init__(self, device: torch.device):
        super().__init__()
        self.is_cuda = device.type == "cuda"
        self.ends = []  # of each operation counted: its start and end
        self.last = None

    def run(self, function, args, kwargs):
        if not self.is_cuda:
            start = time.perf_counter()
            out = function(*args, **kwargs)
            self.last = start, time.perf_counter()
            return out
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(CYCLES_AHEAD)
        start.record()
        out = function(*args, **kwargs)
        end.record()
        self.last = start, end
        return out

    def _operation(self, *args):
        self.ends.append(self.last)
        return super()._operation(*args)

    def finish(self) -> Traffic:
        """The operations counted, each with its seconds."""
        if self.is_cuda:
            torch.cuda.synchronize()
        for op, (start, end) in zip(self.traffic.operations, self.ends, strict=True):
            op.seconds = start.elapsed_time(end) / 1e3 if self.is_cuda else end - start
        return self.traffic
