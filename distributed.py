"""This process's device and its peers: choosing the device, the process group, and what to do when either fails."""

import contextlib
import datetime
import inspect
import logging
import os
import platform
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils import InputError, RunError

logger = logging.getLogger("strip_mlp")

_BUILDS = "https://pytorch.org/get-started/locally lists the builds"
_GPU_FILE = Path("/dev/nvidia0")
_host_group: dist.ProcessGroup | None = None  # connects the CPUs if the main group connects GPUs, else None
_slow_group: dist.ProcessGroup | None = None  # for waits that may take long
_LONG_WAIT = datetime.timedelta(hours=1)  # while another process downloads or caches data
_ROLL_CALL = 10  # seconds in which the remaining processes report
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_places: list[str] = []  # of every rank: its process and machine
_store: dist.Store | None = None  # the store in which the processes met


# ---- the device ----------------------------------------------------------------------------------

def choose_device(name: str = "", index: int = 0) -> torch.device:
    """The device of this process; an InputError if there is none of that name, or a GPU that PyTorch cannot use.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"mps"`` or another that ``torch.accelerator`` reports; if empty, a CUDA GPU if
            there is one, else the CPU.
        index: which of several CUDA GPUs.
    """
    if name == "cpu":
        return torch.device("cpu")
    if name in ("", "cuda") and torch.cuda.is_available():
        shows_one = os.environ.get("CUDA_VISIBLE_DEVICES") and "TORCHELASTIC_RUN_ID" not in os.environ
        if shows_one and torch.cuda.device_count() == 1:
            index = 0  # the only GPU that SLURM shows to this task
        if index >= torch.cuda.device_count():
            raise InputError(f"process {index} of this machine has no GPU: {torch.cuda.device_count()} found; lower "
                             "--nproc_per_node")
        return torch.device("cuda", index)
    if name in ("", "cuda"):
        _check_unused_gpu()
    accelerator = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else ""
    if name in ("", accelerator):
        if not name and accelerator:
            logger.info(f"running on the CPU; --device {accelerator} selects this machine's accelerator, on which this "
                        "code has not been tested")
        return torch.device(name or "cpu")
    raise InputError(f"--device {name}: PyTorch {torch.__version__} finds no such device here; it finds "
                     f"{' and '.join(filter(None, ['cpu', accelerator]))}")


def _check_unused_gpu() -> None:
    """Raises InputError if there is an NVIDIA GPU that is not hidden and that PyTorch cannot use."""
    gpu = "" if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") else _find_nvidia_gpu()
    if not gpu:
        return
    problem = "it is built without CUDA"
    if torch.version.cuda:
        problem = f"CUDA {torch.version.cuda} does not start"
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            problem += f" ({next(iter(str(error).splitlines()), type(error).__name__)})"
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            problem += f"; CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}, is that right?"
    raise InputError(
        f"this machine has an NVIDIA GPU ({gpu}), but PyTorch {torch.__version__} cannot use it: {problem}. Install a "
        f"build for this driver ({_BUILDS}), or a newer driver, or choose the CPU with --device cpu"
    )


def _find_nvidia_gpu() -> str:
    """Name and driver of the machine's first NVIDIA GPU, whether or not PyTorch can use it; empty if it has none."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
        return listed[0].replace(", ", ", driver ")
    except (OSError, subprocess.SubprocessError, IndexError):
        return "nvidia-smi fails" if _GPU_FILE.exists() else ""


# ---- the process group ---------------------------------------------------------------------------

def launcher_local_rank() -> int:
    """This process's number on its machine, as set by the launcher; 0 without a launcher.

    An InputError names the environment variables that a launcher should have set and that are missing or wrong.
    """
    has_launcher = "RANK" in os.environ or "WORLD_SIZE" in os.environ
    missing = [name for name in _LAUNCHER_VARIABLES if not os.environ.get(name)]
    if has_launcher and missing:
        raise InputError(
            f"the launcher's environment variables are incomplete: {', '.join(missing)} missing; start with "
            "torchrun, or unset RANK and WORLD_SIZE to run as one process"
        )
    limits = {"LOCAL_WORLD_SIZE": (1, 2**31 - 1)}  # torchrun sets it, other launchers may not; the data loaders read it
    if has_launcher:
        world_size = os.environ["WORLD_SIZE"]
        last = int(world_size) - 1 if world_size.isdecimal() else 0
        limits |= {"WORLD_SIZE": (1, 2**31 - 1), "RANK": (0, last), "LOCAL_RANK": (0, last),
                   "MASTER_PORT": (1, 2**16 - 1)}
    for name, (low, high) in limits.items():
        value = os.environ.get(name) or "1"
        if not (value.isdecimal() and low <= int(value) <= high):
            raise InputError(
                f"the environment variable {name} is {value!r}; it must be a number from {low} to {high} (WORLD_SIZE "
                f"is {os.environ.get('WORLD_SIZE') or 'not set'}); start with torchrun, which sets it, or unset it, "
                "RANK and WORLD_SIZE to run as one process"
            )
    return int(os.environ["LOCAL_RANK"]) if has_launcher else 0


def init_distributed(device: torch.device, limit_minutes: float = 10.0) -> None:
    """Joins the launcher's process group, if there is a launcher. NCCL connects CUDA devices and gloo CPUs.

    A process that does not answer within ``limit_minutes``, now or later, is an error.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return
    if device.type not in ("cuda", "cpu"):
        raise InputError(f"--device {device.type} runs as one process; start it without torchrun")
    try:
        _init_process_group(device, datetime.timedelta(minutes=limit_minutes))
    except RuntimeError as error:  # of which PyTorch's DistError is one
        raise InputError(
            f"process {os.environ['RANK']} cannot join the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} ({str(error).splitlines()[0]}); if another run uses this port, give the "
            "launcher another --master_port; if the network interface is the wrong one, set GLOO_SOCKET_IFNAME"
        ) from error


def _init_process_group(device: torch.device, limit: datetime.timedelta) -> None:
    store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # torchrun 2.11 keeps one store over its restarts, in which a process may find a dead one's address. On several
        # machines restarts may be counted differently; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 renews the store.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    group = {"store": store, "rank": rank, "world_size": world_size}
    global _host_group, _slow_group, _places, _store
    if device.type == "cpu":
        dist.init_process_group("gloo", timeout=limit, **group)
    else:
        torch.cuda.set_device(device)
        # Gloo on the CPUs notices a process that hangs and can name it; NCCL only notices a device that hangs.
        dist.init_process_group("nccl", device_id=device, timeout=limit + datetime.timedelta(minutes=1), **group)
        _host_group = dist.new_group(backend="gloo", timeout=limit)
    _slow_group = dist.new_group(backend="gloo", timeout=_LONG_WAIT)
    _places, _store = gather_objects(f"process {os.getpid()} on {platform.node()}"), store


def wrap(model: nn.Module) -> DistributedDataParallel:
    """The network with its gradients averaged over all processes; the running statistics are averaged elsewhere."""
    old_name = "forward_sync_buffers" not in inspect.signature(DistributedDataParallel).parameters
    no_buffers = {"broadcast_buffers" if old_name else "forward_sync_buffers": False}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **no_buffers)


def leave() -> None:
    """Leaves the process group, if there is one."""
    global _host_group, _slow_group
    if not dist.is_initialized():
        return
    # When PyTorch 2.6 frees a group, it waits for gloo's threads and blocks Python meanwhile: a thread that must still
    # free a tensor waits for ever. Freeing a backend does not block Python, so the backends are freed last.
    groups = [g for g in (dist.group.WORLD, _host_group, _slow_group) if g and dist.get_backend(g) == "gloo"]
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    del groups
    _host_group = _slow_group = None
    dist.destroy_process_group()
    del backends


def silent_processes(error: RuntimeError) -> list[str] | None:
    """The processes that do not answer, if ``error`` says that an operation timed out, which may be none; else None.

    The remaining processes report to one another through the store in which they met.
    """
    if not dist.is_initialized() or not re.search("timed? ?out", str(error), re.IGNORECASE):
        return None
    answers = []
    caller = threading.Thread(target=_call_roll, args=(answers,), daemon=True)  # the store may not answer either
    caller.start()
    caller.join(2 * _ROLL_CALL)
    return [f"rank {other} ({_places[other]})" for other in range(world_size()) if other not in answers]


def _call_roll(answers: list[int]) -> None:
    answers.append(rank())
    _store.set(f"here: {_places[rank()]}", "")
    deadline = time.monotonic() + _ROLL_CALL
    for other, place in enumerate(_places):
        left = max(deadline - time.monotonic(), 0.1)
        with contextlib.suppress(RuntimeError):
            _store.wait([f"here: {place}"], datetime.timedelta(seconds=left))
            answers.append(other)


def rank() -> int:
    """This process's rank among all; 0 without a launcher."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """This process's rank on its machine; 0 without a launcher."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


def is_distributed() -> bool:
    """Whether a launcher started this process, alone or with others."""
    return dist.is_initialized()


def world_size() -> int:
    """The number of processes; 1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits for all processes, for up to an hour because they may be downloading."""
    if dist.is_initialized():
        dist.barrier(group=_slow_group)


def once_per_machine(action) -> None:
    """Calls ``action()`` in the first process, then in one process of each machine, as these may not share its disk."""
    if rank() == 0:
        action()
    barrier()
    if local_rank() == 0 and rank() != 0:
        action()
    barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over all processes, in place; a CPU tensor with gloo."""
    if dist.is_initialized():
        dist.all_reduce(tensor, group=_host_group if tensor.device.type == "cpu" else None)
    return tensor


def gather_objects(value) -> list:
    """Every process's ``value``, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=_host_group)
    return values


def begin_any(value: bool) -> Callable[[], bool]:
    """Starts asking whether ``value`` is true on any process; calling the result waits for the CPUs' answers."""
    count = torch.tensor(int(value))
    work = dist.all_reduce(count, group=_host_group, async_op=True)

    def wait() -> bool:
        work.wait()
        return count.item() > 0

    return wait


def broadcast_object(value):
    """Rank 0's ``value``."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, group=_host_group)
    return values[0]


# ---- failures ------------------------------------------------------------------------------------

@contextlib.contextmanager
def machine_failures():
    """Turns failures of the machine into a RunError with advice.

    PyTorch reports most of them as a plain RuntimeError, which only its message tells from a bug.
    """
    try:
        yield
    except ValueError as error:
        if "Expected more than 1 value per channel when training" not in str(error):
            raise
        raise RunError(f"{error}. BatchNorm needs more: raise --batch-size, or DATA.IMG_SIZE.") from error
    except (RuntimeError, MemoryError) as error:
        text = str(error) or type(error).__name__
        if "DataLoader timed out" in text:
            raise RunError("the data workers gave no batch within HANG_MINUTES; they or their storage hang. Rerun the "
                           "same command to resume") from error
        silent = silent_processes(error)
        if silent is not None:
            cause = (f"no answer within HANG_MINUTES from {', '.join(silent)}; it hangs, or its network is down"
                     if silent else "a process answered later than HANG_MINUTES; it or its network was slow")
            raise RunError(f"{cause}. Rerun the same command to resume, or use torchrun --max-restarts") from error
        if isinstance(error, torch.OutOfMemoryError):
            advice = "Lower --batch-size and raise --accumulation-steps to compensate, or add --use-checkpoint."
        elif isinstance(error, MemoryError) or "DefaultCPUAllocator" in text or "could not create a primitive" in text:
            advice = "Lower --batch-size and raise --accumulation-steps to compensate, or lower DATA.NUM_WORKERS."
        elif "no kernel image" in text:
            advice = f"This PyTorch has no code for this GPU: install another build ({_BUILDS}), or use --device cpu."
        elif "Too many open files" in text:
            advice = "Raise the limit (ulimit -n), or lower DATA.NUM_WORKERS."
        elif "DataLoader worker" in text and "Original Traceback" not in text:  # one that died
            advice = "Memory is often the reason: lower DATA.NUM_WORKERS, or cache less (--cache-mode)."
        elif isinstance(error, dist.DistError) or "gloo/transport" in text:
            advice = "Another process of this run has ended; see its error message."
        elif "deterministic" in text and torch.are_deterministic_algorithms_enabled():
            advice = "Set DETERMINISTIC False, or use a network without this operation."
        else:
            raise
        raise RunError(f"{text.splitlines()[0].rstrip('. ')}. {advice}") from error
