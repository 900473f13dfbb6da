"""The process group: joining it, ranks, and what processes tell one another."""

import datetime
import os

import torch
import torch.distributed as dist

_host_group: dist.ProcessGroup | None = None  # connects the hosts where the main group connects devices; None: the main
_PATIENCE = datetime.timedelta(hours=1)  # of one process for another that downloads or caches data
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def init_distributed(device: str = "") -> torch.device:
    """Joins the launcher's process group, if there is a launcher, and returns this process's device.

    NCCL connects CUDA devices and gloo CPUs.

    Args:
        device: ``"cuda"``, ``"cpu"``, or empty for a GPU if there is one, else the CPU.

    Raises:
        ValueError: the launcher's environment variables are set only in part or wrong, or there are too few GPUs.
        OSError: the processes cannot connect.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA GPU here; use --device cpu, or install a CUDA build")
    local_rank = 0
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        _check_launcher_variables()
        local_rank = int(os.environ["LOCAL_RANK"])
        if device == "cuda" and local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} found; lower "
                "--nproc_per_node"
            )
        try:
            _init_process_group(device, local_rank)
        except dist.DistError as error:
            raise OSError(
                f"process {os.environ['RANK']} cannot join the others at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']} ({str(error).splitlines()[0]}); where another run holds this port, give "
                "the launcher another --master_port"
            ) from error
    return torch.device(device, local_rank) if device == "cuda" else torch.device(device)


def _check_launcher_variables() -> None:
    values = {name: os.environ.get(name) for name in _LAUNCHER_VARIABLES}
    missing = [name for name, value in values.items() if not value]
    if missing:
        raise ValueError(
            f"the launcher's environment variables are set in part: {', '.join(missing)} missing; start with "
            "torchrun, or unset RANK and WORLD_SIZE to run as one process"
        )
    world_size = values["WORLD_SIZE"]
    last = int(world_size) - 1 if world_size.isdecimal() else 0
    limits = {"WORLD_SIZE": (1, 2**31 - 1), "RANK": (0, last), "LOCAL_RANK": (0, last), "MASTER_PORT": (1, 2**16 - 1)}
    for name, (low, high) in limits.items():
        if not (values[name].isdecimal() and low <= int(values[name]) <= high):
            raise ValueError(
                f"the environment variable {name} is {values[name]!r}; it must be a number from {low} to {high} "
                f"(WORLD_SIZE is {world_size}); start with torchrun, which sets it"
            )


def _init_process_group(device: str, local_rank: int) -> None:
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # torchrun 2.11 keeps one store over its restarts, in which a process may find a dead one's address. On several
        # machines restarts may be counted differently; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 renews the store.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    group = {"store": store, "rank": rank, "world_size": world_size}
    if device == "cpu":
        dist.init_process_group("gloo", timeout=_PATIENCE, **group)
        return
    torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", local_rank), **group)
    global _host_group
    _host_group = dist.new_group(backend="gloo", timeout=_PATIENCE)


def rank() -> int:
    """This process's rank among all; 0 without a launcher."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """This process's rank among those of its machine; 0 without a launcher."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


def is_distributed() -> bool:
    """Whether a launcher started this process, alone or with others."""
    return dist.is_initialized()


def world_size() -> int:
    """The number of processes; 1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits for all processes, for up to an hour."""
    if dist.is_initialized():
        dist.barrier(group=_host_group)


def once_per_machine(action) -> None:
    """Calls ``action()`` in the first process and then, for machines that do not share its disk, in one of each."""
    if rank() == 0:
        action()
    barrier()
    if local_rank() == 0 and rank() != 0:
        action()
    barrier()


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
    dist.all_gather_object(values, value, group=_host_group)
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
        dist.broadcast_object_list(values, group=_host_group)
    return values[0]
