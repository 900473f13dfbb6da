"""Checkpoint files: save, verify, load safely, find the newest good one.

A checkpoint is a PyTorch file, whose zip form keeps a CRC-32 beside every record. Saving is atomic; loading checks the
sums first and then admits nothing but tensors and plain containers, so that no file can run code.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import pickle
import platform
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open  # which timm requires

from models import InputError, MissingFileError

logger = logging.getLogger("strip_mlp")

BEST = "best.pth"
SAFETENSORS_ABOUT = ("config", "classes")  # entries of a checkpoint that a safetensors file holds as JSON
_NAME = re.compile(r"ckpt_step_(\d+)\.pth")


class CheckpointError(InputError):
    """A checkpoint file that cannot be used; the message names the file and the fault."""


def load_file(path: str | Path) -> dict:
    """Reads a checkpoint, this project's or a released one, onto the CPU without running anything in it.

    PyTorch's restricted unpickler does the reading. A released checkpoint also holds a pickled ``yacs.config.CfgNode``,
    for which a plain mapping stands in. A ``.safetensors`` file gives ``model`` and, where ``tools/export.py`` made it,
    ``config`` and ``classes``.

    Raises:
        MissingFileError: there is no such file.
        CheckpointError: the file is damaged, is no checkpoint, or holds an object of a class that is not admitted.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"checkpoint {path} does not exist")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise CheckpointError(f"{path} is damaged: the checksum of its record {damaged} does not match")
        torch.serialization.add_safe_globals([(OrderedDict, "yacs.config.CfgNode")])
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise CheckpointError(
                f"{path} holds a pickled {refused[1]}; only tensors and plain containers are loaded, since unpickling "
                "anything else could run code"
            ) from error
        raise CheckpointError(f"{path} is not a PyTorch file, or a damaged one") from error
    except Exception as error:  # a damaged file can fail in any way inside the reader
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not a mapping of checkpoint entries")
    return _plain(content)


@contextlib.contextmanager
def naming(path: str | Path):
    """Puts the name of a checkpoint before an error about its content."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def save_file(content: dict, path: str | Path) -> None:
    """Writes a checkpoint so that ``path`` is at any moment either the old file or the new one, whole and on disk.

    Raises:
        OSError: it could not be written; ``path`` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        _replace(temporary, path)
    except RuntimeError as error:  # what PyTorch's writer makes of a full disk
        if "DataLoader worker" in str(error):  # the news of one that died, which comes in the middle of anything
            raise
        raise OSError(f"cannot write {path}: {_first_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The run's numbered checkpoints, the newest (by step) first."""
    steps = {path: int(match[1]) for path in Path(folder).glob("*.pth") if (match := _NAME.fullmatch(path.name))}
    return sorted(steps, key=steps.get, reverse=True)


def save_checkpoint(content: dict, folder: str | Path, is_best: bool, keep: int) -> Path:
    """Saves a run's checkpoint under its step, marks it as ``best.pth`` if it is, and prunes old ones to ``keep``."""
    path = Path(folder) / f"ckpt_step_{content['step']:08d}.pth"
    save_file(content, path)
    if is_best:
        temporary = path.with_name(f".{BEST}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
            _replace(temporary, path.with_name(BEST))
        except OSError:  # a file system without hard links
            save_file(content, path.with_name(BEST))
    others = [other for other in list_checkpoints(folder) if other != path]
    for old in others[keep - 1:]:
        old.unlink()
    return path


def set_aside_after(step: int, folder: str | Path) -> None:
    """Renames the checkpoints of later steps than the one that a run goes on from.

    They are damaged, or count the updates of another batch size; left where they are, they would pass for newer than
    those to come.
    """
    for path in list_checkpoints(folder):
        if int(_NAME.fullmatch(path.name)[1]) > step:
            aside = path.with_name(path.name + ".aside")
            os.replace(path, aside)
            logger.warning("the run goes on from step %s; set aside %s", step, aside)


def newest_checkpoint(folder: str | Path) -> tuple[Path, dict] | None:
    """The newest checkpoint of a run that can be loaded, and its content; damaged ones are skipped with a warning.

    Returns:
        None where the folder holds no numbered checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints and none is good, so starting afresh would overwrite a run.
    """
    paths = list_checkpoints(folder)
    for path in paths:
        try:
            return path, load_file(path)
        except CheckpointError as error:
            logger.warning("skipping a checkpoint: %s", error)
    if paths:
        raise CheckpointError(
            f"none of the {len(paths)} checkpoints in {folder} can be loaded; move them away to start afresh, or name "
            "a good one with --resume"
        )
    return None


def lock_folder(folder: str | Path):
    """Keeps other runs out of an output folder for as long as the returned file is open.

    The lock is this process's alone, not its forked data workers': one left by a dead run does not block.

    Raises:
        InputError: another run holds it, or the file system knows no locks.
    """
    file = open(Path(folder, ".lock"), "a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise InputError(f"{folder} belongs to a run in progress ({holder}); give this one another --tag") from None
        raise InputError(f"cannot lock {folder} ({error.strerror}); its file system must know locks") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def _replace(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the renaming itself last
    finally:
        os.close(folder)


def _load_safetensors(path: Path) -> dict:
    try:
        with safe_open(path, "pt") as file:
            about = {key: json.loads(text) for key, text in (file.metadata() or {}).items() if key in SAFETENSORS_ABOUT}
            return {"model": {key: file.get_tensor(key) for key in file.keys()}} | about
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {_first_line(error)}") from error


def _plain(value):
    """The same content with plain dictionaries in place of the stand-in for CfgNode and other mappings."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
