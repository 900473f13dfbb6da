"""Checkpoint files: save, verify, load safely, find the newest good one.

A checkpoint is a PyTorch file, a zip archive with a CRC-32 for every record. Saving is atomic. Loading verifies the
checksums first and then admits only tensors and plain containers, so that no file can run code.
"""

import errno
import json
import logging
import mmap
import os
import pickle
import platform
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open  # which timm requires
from torch import nn

from utils import InputError, MissingFileError, check_place, move, printable, replacing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger("strip_mlp")

BEST = "best.pth"
SAFETENSORS_ABOUT = ("config", "classes")  # entries of a checkpoint that a safetensors file stores as JSON
_ENCODE = b"c_codecs\nencode\n"  # PyTorch's unpickler creates bytes with it; the Punycode codec takes quadratic time
_NAME = re.compile(r"ckpt_step_(\d+)\.pth")
MAX_DEPTH = 32  # of containers in containers
MAX_ENTRIES = 1_000_000  # a training on 1,000 processes, mostly their random states, has fewer
MAX_TEXT = 500  # characters of a key, a config value or a class name
_SCALARS = (type(None), bool, float, complex, str, torch.dtype, torch.device)


class CheckpointError(InputError):
    """A checkpoint file that cannot be used; the message names the file and the problem."""


def load_file(path: str | Path) -> dict:
    """Reads a checkpoint, this project's or a released one, onto the CPU without running anything in it.

    PyTorch's restricted unpickler does the reading. A released checkpoint also holds a pickled ``yacs.config.CfgNode``,
    for which a plain mapping stands in. A ``.safetensors`` file gives ``model`` and, where ``tools/export.py`` made it,
    ``config`` and ``classes``.

    Raises:
        MissingFileError: there is no such file.
        CheckpointError: the file is damaged, is not a checkpoint, or holds an object of a class that is not admitted.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise MissingFileError(f"checkpoint {path} does not exist")
    if not path.is_file():  # opening a pipe could block forever
        raise CheckpointError(f"{path} is not a regular file")
    try:
        content = _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)
        if not isinstance(content, dict):
            raise InputError(f"it holds {type(content).__name__}, not a mapping of checkpoint entries")
        return plain(content, tensor_bytes=2 * path.stat().st_size)  # an entry may share its numbers with another one
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise CheckpointError(
                f"{path} holds a pickled {printable(refused[1])}; only tensors and plain containers are loaded, "
                "because unpickling anything else could run code"
            ) from error
        raise CheckpointError(f"{path} is not a PyTorch file, or is damaged") from error
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # a damaged file can fail in any way inside the reader
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {_first_line(error)}") from error


def save_file(content: dict, path: str | Path) -> None:
    """Writes a checkpoint so that ``path`` is at any moment either the complete old file or the complete new one.

    Raises:
        OSError: it could not be written; ``path`` is as it was.
    """
    path = Path(path)
    try:
        with replacing(path) as file:
            torch.save(content, file)
    except RuntimeError as error:  # how PyTorch's writer reports a full disk
        if "DataLoader worker" in str(error):  # a worker died; this can be raised anywhere
            raise
        raise OSError(f"cannot write {path}: {_first_line(error)}") from error


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The run's numbered checkpoints, the newest (by step) first."""
    steps = {path: int(match[1]) for path in Path(folder).glob("*.pth") if (match := _NAME.fullmatch(path.name))}
    return sorted(steps, key=steps.get, reverse=True)


def save_checkpoint(content: dict, folder: str | Path, is_best: bool, keep: int) -> Path:
    """Saves a run's checkpoint under its step, as ``best.pth`` too if it is the best, and keeps the ``keep`` newest."""
    path = Path(folder) / f"ckpt_step_{content['step']:08d}.pth"
    save_file(content, path)
    if is_best:
        temporary = path.with_name(f".{BEST}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
            move(temporary, path.with_name(BEST))
        except OSError:  # a file system without hard links
            save_file(content, path.with_name(BEST))
    others = [other for other in list_checkpoints(folder) if other != path]
    for old in others[keep - 1:]:
        if old.is_file() or old.is_symlink():
            old.unlink()
    return path


def set_aside_after(step: int, folder: str | Path) -> None:
    """Renames the checkpoints of later steps than the one that a run resumes from.

    They are damaged, or count updates of another batch size. If they kept their names, they would seem newer than the
    checkpoints to come.
    """
    for path in list_checkpoints(folder):
        if int(_NAME.fullmatch(path.name)[1]) > step:
            aside = path.with_name(path.name + ".aside")
            os.replace(path, aside)
            logger.warning("the run resumes from step %s; set aside %s", step, aside)


def newest_checkpoint(folder: str | Path) -> tuple[Path, dict] | None:
    """The newest checkpoint of a run that can be loaded, and its content; damaged ones are skipped with a warning.

    Returns:
        None if the folder holds no numbered checkpoint.

    Raises:
        CheckpointError: there are checkpoints but none can be loaded, so starting afresh would overwrite a run.
    """
    paths = list_checkpoints(folder)
    for path in paths:
        try:
            return path, load_file(path)
        except (CheckpointError, OSError) as error:
            logger.warning("skipping a checkpoint: %s", str(error))  # the error would keep the content in memory
    if paths:
        raise CheckpointError(
            f"none of the {len(paths)} checkpoints in {folder} can be loaded; move them away to start afresh, or name "
            "a good one with --resume"
        )
    return None


def lock_folder(folder: str | Path):
    """Keeps other runs out of an output folder while the returned file is open.

    The lock belongs to this process, not to its forked data workers, so a dead run does not leave it locked.

    Raises:
        InputError: another run holds it, the lock's path is not a regular file, or the file system does not support
            locks.
    """
    path = Path(folder, ".lock")
    check_place(path)
    file = open(path, "a+", encoding="utf-8", errors="replace")
    if fcntl is None:
        logger.warning("this system has no file locks: nothing stops a second run from writing into %s", folder)
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = printable(file.read(200).strip())
        file.close()
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise InputError(f"{folder} is in use by another run ({holder}); give this run another --tag") from None
        raise InputError(f"cannot lock {folder} ({error.strerror}); its file system must support locks") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def plain(content, tensor_bytes: int):
    """The same content in plain containers, its tensors reduced to their numbers.

    Args:
        content: the content of a file.
        tensor_bytes: the most memory that its tensors may take.

    Raises:
        InputError: it is nested too deep, has too many entries or too large tensors, a tensor that is not dense and on
            the CPU, or a value other than tensors, numbers and text.
    """
    entries = 0

    def visit(value, depth: int):
        nonlocal entries, tensor_bytes
        entries += 1
        if entries > MAX_ENTRIES:
            raise InputError(f"it has more than {MAX_ENTRIES} entries")
        if depth > MAX_DEPTH:
            raise InputError(f"its entries are nested more than {MAX_DEPTH} deep")
        if isinstance(value, dict):
            return {_plain_key(key): visit(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return (list if isinstance(value, list) else tuple)(visit(item, depth + 1) for item in value)
        if isinstance(value, torch.Tensor):
            _check_tensor(value)
            tensor_bytes -= value.numel() * value.element_size()
            if tensor_bytes < 0:
                raise InputError("its tensors are larger than the file that holds them")
            return value.detach().clone()  # in memory of its own
        if type(value) in _SCALARS or type(value) is int and abs(value) < 2**64:
            return value
        raise InputError(f"it holds an entry of the type {type(value).__name__}, which no checkpoint needs")

    return visit(content, 0)


def _plain_key(key) -> str | int:
    if isinstance(key, str) and len(key) <= MAX_TEXT and key.isprintable():
        return key
    if type(key) is int and abs(key) < 2**64:
        return key
    raise InputError(f"it holds an entry named {short(key)}")


def _check_tensor(tensor: torch.Tensor) -> None:
    is_dense = tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested)
    if type(tensor) not in (torch.Tensor, nn.Parameter) or not is_dense or tensor.device.type != "cpu":
        raise InputError("it holds a tensor that is not dense and on the CPU (sparse, quantised, nested, meta)")
    if tensor.is_conj() or tensor.is_neg():
        raise InputError("it holds a tensor that is a conjugate or negative view of another one")


def _load_torch(path: Path):
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data.find(_ENCODE) >= 0:
            raise InputError("it holds pickled bytes, which no checkpoint needs and which can take hours to decode")
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            is_stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
            if not is_stored or sum(record.file_size for record in records) > path.stat().st_size:
                raise InputError("its records are compressed or overlap, unlike those that PyTorch writes")
            damaged = archive.testzip()
        if damaged:
            raise InputError(f"it is damaged: the checksum of its record {printable(damaged)} does not match")
    torch.serialization.add_safe_globals([(OrderedDict, "yacs.config.CfgNode")])
    # With a memory-mapped file, no version of PyTorch reads beyond the end of a record that claims too many bytes.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _load_safetensors(path: Path) -> dict:
    try:
        with safe_open(path, "pt") as file:
            about = {key: json.loads(text) for key, text in (file.metadata() or {}).items() if key in SAFETENSORS_ABOUT}
            return {"model": {key: file.get_tensor(key) for key in file.keys()}} | about
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return printable(next(iter(str(error).splitlines()), type(error).__name__))[:300]


def short(value) -> str:
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
