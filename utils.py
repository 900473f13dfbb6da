"""The process group, random states, reductions, and what a run says about itself."""

import os
import platform
import random
import subprocess
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

_host_group: dist.ProcessGroup | None = None  # connects the hosts where the main group connects devices; None: the main
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


# ---- process group -------------------------------------------------------------------------------

def init_distributed(device: str = "") -> torch.device:
    """Joins the launcher's process group, if there is a launcher, and returns this process's device.

    NCCL connects CUDA devices and gloo CPUs.

    Args:
        device: ``"cuda"``, ``"cpu"``, or empty for a GPU if there is one, else the CPU.

    Raises:
        ValueError: the launcher's environment variables are set only in part, or there are too few GPUs.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA GPU here; use --device cpu, or install a CUDA build")
    local_rank = 0
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        missing = [name for name in _LAUNCHER_VARIABLES if not os.environ.get(name)]
        if missing:
            raise ValueError(
                f"the launcher's environment variables are set in part: {', '.join(missing)} missing; start with "
                "torchrun, or unset RANK and WORLD_SIZE to run as one process"
            )
        local_rank = int(os.environ["LOCAL_RANK"])
        if device == "cuda":
            if local_rank >= torch.cuda.device_count():
                raise ValueError(
                    f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} found; lower "
                    "--nproc_per_node"
                )
            torch.cuda.set_device(local_rank)
            dist.init_process_group("nccl", device_id=torch.device("cuda", local_rank))
            global _host_group
            _host_group = dist.new_group(backend="gloo")
        else:
            dist.init_process_group("gloo")
    return torch.device(device, local_rank) if device == "cuda" else torch.device(device)


def rank() -> int:
    """This process's rank among all; 0 without a launcher."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """This process's rank among those of its machine; 0 without a launcher."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes; 1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits for all processes."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value) -> list:
    """Every process's ``value``, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def agree_on_largest(value: int) -> int:
    """The largest ``value`` of all processes, agreed on by their hosts without waiting for their devices."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_host_group)
    return int(largest)


def broadcast_object(value):
    """Rank 0's ``value``."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


# ---- random states -------------------------------------------------------------------------------

def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def get_rng_state() -> dict:
    """This process's random states, in plain containers and tensors."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict) -> None:
    """Restores what ``get_rng_state`` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# ---- what a run says about itself ----------------------------------------------------------------

@torch.no_grad()
def count_macs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image of ``shape`` (C, H, W): convolutions, strip layers and linear layers."""
    training, parameter = model.training, next(model.parameters())
    model.eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype))
    model.train(training)
    return counter.get_total_flops() // 2  # the counter takes a multiply-accumulate for two operations


def git_commit() -> str:
    """The commit of this code, with ``-dirty`` after it when files differ from it; ``unknown`` outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe_environment(device: torch.device) -> dict:
    """Versions of what a run depends on, and the machine that it runs on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "timm": timm.__version__,
        "git_commit": git_commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores",
        "world_size": world_size(),
    }
