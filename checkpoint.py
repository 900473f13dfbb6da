"""Checkpoint files: save, read without running anything in them, lock a run's folder, find the newest good one.

A checkpoint is a PyTorch file. Saving is atomic. Reading uses one reader, below, for both of PyTorch's formats: a zip
archive whose records have checksums, and the older one. It builds tensors and plain containers; an inert ``Unknown``
stands in for everything else, so that no file can run code.
"""

import errno
import functools
import io
import json
import logging
import math
import os
import pickle
import platform
import re
import struct
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from utils import InputError, MissingFileError, check_place, move, printable, replacing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger("strip_mlp")

BEST = "best.pth"
SAFETENSORS_METADATA = ("config", "classes")  # entries of a checkpoint that a safetensors file stores as JSON
MAX_DEPTH = 32  # of containers in containers
MAX_ENTRIES = 1_000_000  # a training on 1,000 processes, mostly their random states, has fewer
MAX_TEXT = 500  # characters of a key, a config value or a class name
MAX_PICKLE = 2**24  # bytes of a file that describe its content; the numbers of its tensors come in addition
_NAME = re.compile(r"ckpt_step_(\d+)\.pth")
_SCALARS = (type(None), bool, float, str)


class CheckpointError(InputError):
    """A checkpoint file that cannot be used; the message names the file and the problem."""


class Unknown:
    """Stands in for an object of a class that no network needs. It ignores what it is given."""

    def __init__(self, *args, **kwargs):
        pass

    def append(self, item):
        """Ignores an item, as ``extend`` and ``[key] = item`` do."""

    extend = append

    def __setitem__(self, key, item):
        pass

    def __repr__(self):
        return "an object of an unknown class"


def load_file(path: str | Path) -> dict:
    """Reads a checkpoint, this project's, a released one or another trainer's, onto the CPU.

    Nothing in the file runs. Mappings come as ``dict``, among them the ``yacs.config.CfgNode`` of a released
    checkpoint; objects of other classes come as ``Unknown``. A ``.safetensors`` file gives ``model`` and, where
    ``tools/export.py`` made it, ``config`` and ``classes``.

    Raises:
        MissingFileError: there is no such file.
        CheckpointError: the file is damaged or is not a checkpoint.
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
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # a damaged file can fail in any way inside the reader
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({reason})") from error


def save_file(content: dict, path: str | Path) -> None:
    """Writes a checkpoint so that ``path`` is at any moment either the complete old file or the complete new one.

    If it cannot be written, ``path`` is as it was, and OSError is raised.
    """
    path = Path(path)
    try:
        with replacing(path) as file:
            torch.save(content, file)
    except RuntimeError as error:  # how PyTorch's writer reports a full disk
        if "DataLoader worker" in str(error):  # a worker died; this can be raised anywhere
            raise
        raise OSError(f"cannot write {path}: {_first_line(error)}") from error


# ---- the checkpoints of a run --------------------------------------------------------------------

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
    """Renames the checkpoints after the step that a run resumes from, which would seem newer than those to come.

    They are damaged, or count updates of another batch size.
    """
    for path in list_checkpoints(folder):
        if int(_NAME.fullmatch(path.name)[1]) > step:
            aside = path.with_name(path.name + ".aside")
            os.replace(path, aside)
            logger.warning("the run resumes from step %s; set aside %s", step, aside)


def newest_checkpoint(folder: str | Path) -> tuple[Path, dict] | None:
    """The newest checkpoint of a run that can be loaded, and its content; damaged ones are skipped with a warning.

    None if the folder holds no numbered checkpoint. If it holds some but none can be loaded, it is a CheckpointError,
    because starting afresh would overwrite a run.
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
    """Keeps other runs out of an output folder while the returned file is open; if one holds it, it is an InputError.

    The lock belongs to this process, not to its forked data workers, so a dead run does not leave it locked. Where the
    system or the file system has no locks, a warning is logged instead.
    """
    path = Path(folder, ".lock")
    check_place(path)
    file = open(path, "a+", encoding="utf-8", errors="replace")
    try:
        if fcntl is None:
            raise OSError(errno.ENOLCK, "this system has no file locks")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            logger.warning("cannot lock %s (%s): make sure that no second run writes into it", folder, error.strerror)
            return file
        file.seek(0)
        holder = printable(file.read(200).strip())
        file.close()
        raise InputError(f"{folder} is in use by another run ({holder}); give this run another --tag") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


# ---- reading -------------------------------------------------------------------------------------

def plain(content, tensor_bytes: int):
    """The same content in plain containers: ``dict`` by text and numbers, ``list``, ``tuple``, tensors in memory of
    their own, numbers and text; anything else is ``Unknown``.

    InputError: it is nested too deep, has too many entries, or tensors of more than ``tensor_bytes``.
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
            return {key: visit(item, depth + 1) for key, item in value.items() if _is_plain_key(key)}
        if isinstance(value, (list, tuple)):
            return (list if isinstance(value, list) else tuple)(visit(item, depth + 1) for item in value)
        if isinstance(value, torch.Tensor):
            tensor_bytes -= value.numel() * value.element_size()
            if tensor_bytes < 0:
                raise InputError("its tensors are larger than the file that holds them")
            return value.detach().clone()
        return value if type(value) in _SCALARS or type(value) is int and abs(value) < 2**64 else Unknown()

    return visit(content, 0)


def _is_plain_key(key) -> bool:
    """Whether a network could have such a key, and a message could show it; others are left out."""
    return type(key) is int and abs(key) < 2**64 or type(key) is str and len(key) <= MAX_TEXT and key.isprintable()


def short(value) -> str:
    """A value for an error message: escaped, and cut after 80 characters."""
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _load_safetensors(path: Path) -> dict:
    try:
        with safe_open(path, "pt") as file:
            metadata = {key: json.loads(text) for key, text in (file.metadata() or {}).items()
                        if key in SAFETENSORS_METADATA}
            return {"model": {key: file.get_tensor(key) for key in file.keys()}} | metadata
    except SafetensorError as error:
        raise InputError(f"it is damaged or not a safetensors file: {_first_line(error)}") from error


def _load_torch(path: Path):
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        return _load_zip(file) if is_zip else _load_legacy(file)


def _load_zip(file):
    """PyTorch's zip format: NAME/data.pkl and, for each storage, its numbers in NAME/data/KEY, all uncompressed."""
    file.seek(-22, os.SEEK_END)
    end = file.read()
    with zipfile.ZipFile(file) as archive:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        ends = [record.header_offset + 30 + len(record.filename) + record.file_size for record in records]
        starts = [record.header_offset for record in records[1:]] + [archive.start_dir]
        names = {record.filename for record in records}
        if (
            end[:4] != b"PK\x05\x06" or end[20:] != b"\0\0" or not records or records[0].header_offset
            or any(record.compress_type != zipfile.ZIP_STORED for record in records)
            or any(end > start for end, start in zip(ends, starts, strict=True)) or len(names) < len(records)
        ):
            raise InputError("it is not an archive as PyTorch writes it: one list of uncompressed records, nothing "
                             "before or after it")
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1 or archive.getinfo(pickles[0]).file_size > MAX_PICKLE:
            raise InputError(f"it must hold one record data.pkl, of at most {MAX_PICKLE} bytes")
        folder = pickles[0].removesuffix("data.pkl")

        @functools.cache
        def read(name: str) -> bytearray:
            try:
                return bytearray(archive.read(name))
            except zipfile.BadZipFile:
                raise InputError(f"it is damaged: the checksum of its record {printable(name)} is wrong") from None

        def storage(key: str, dtype: torch.dtype, count: int) -> torch.Tensor:
            numbers = read(f"{folder}data/{key}")
            return torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)

        if folder + "byteorder" in names and read(folder + "byteorder") != b"little":
            raise InputError("it was written on a big-endian machine")
        content = _Unpickler(io.BytesIO(read(pickles[0])), storage).load()
        for name in names:  # the checksums of what nothing refers to
            read(name)
    return content


def _load_legacy(file):
    """The format before PyTorch 1.6: pickles of a magic number, a version, the machine, the content and the storages'
    keys, then each storage as its length and its numbers, in the order of the keys."""
    size, storages = os.fstat(file.fileno()).st_size, {}

    def storage(key: str, dtype: torch.dtype, count: int) -> torch.Tensor:
        if key not in storages:
            if not 0 <= count * dtype.itemsize <= size - sum(other.nbytes for other in storages.values()):
                raise InputError("its tensors are larger than the file that holds them")
            storages[key] = torch.empty(count, dtype=dtype)
        return storages[key]

    head = io.BytesIO(file.read(MAX_PICKLE))
    magic, version, machine, content, keys = (_Unpickler(head, storage).load() for _ in range(5))
    file.seek(head.tell())
    if (magic, version) != (0x1950A86A20F9469CFC6C, 1001) or machine.get("little_endian") is not True:
        raise InputError("it is not a PyTorch file")
    for key in keys:
        if struct.unpack("<q", file.read(8)) != (storages[key].numel(),):
            raise InputError("the length of a tensor differs from its description")
        if len(storages[key]):
            into = storages[key].view(torch.uint8).numpy()
            if file.readinto(into) != len(into):
                raise InputError("it ends early")
    if len(set(keys)) < len(storages) or file.read(1):
        raise InputError("it has more or fewer bytes than its content")
    return content


class _Unpickler(pickle._Unpickler):
    """Python's unpickler in Python (the one in C can be made to allocate any amount of memory), knowing only what a
    state dict needs. ``storage`` turns (key, dtype, number of elements) into a storage's numbers, a tensor."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file, storage):
        super().__init__(file, encoding="utf-8")
        self.storage = storage

    def find_class(self, module: str, name: str):
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        kind = getattr(torch, name, None) if module == "torch" else None
        return kind if isinstance(kind, torch.dtype) else _CLASSES.get(f"{module}.{name}", Unknown)

    def persistent_load(self, pid):
        _, dtype, key, _, count, *view = pid
        if view not in ([], [None]):
            raise InputError("it holds a view of another storage, which PyTorch has not written since 0.4")
        return self.storage(str(key), dtype, count) if isinstance(dtype, torch.dtype) else Unknown()

    def _ignore_state(self):
        """BUILD would set attributes or call ``__setstate__``."""
        self.stack.pop()

    def _refuse(self):
        raise InputError("it holds an operation that no checkpoint needs")

    def _checked(method, depth: int, *kinds: type):
        """The operation, refused if the object at that depth of the stack is of another kind: unpacking or changing a
        tensor could take any amount of memory and time."""
        def check(self):
            if not isinstance(self.stack[-depth] if depth else self.metastack[-1][-1], kinds):
                self._refuse()
            method(self)
        return check

    dispatch[pickle.BUILD[0]] = _ignore_state
    for opcode in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.NEWOBJ_EX):
        dispatch[opcode[0]] = _refuse
    for opcode, depth, *kinds in (
        (pickle.REDUCE, 1, tuple), (pickle.NEWOBJ, 1, tuple), (pickle.APPEND, 2, list, Unknown),
        (pickle.SETITEM, 3, dict, Unknown), (pickle.APPENDS, 0, list, Unknown), (pickle.SETITEMS, 0, dict, Unknown),
    ):
        dispatch[opcode[0]] = _checked(dispatch[opcode[0]], depth, *kinds)


class _Mapping(dict):
    """An OrderedDict, a CfgNode."""

    def __init__(self, items=()):
        super().__init__(items if isinstance(items, list) else ())


def _tensor(storage, offset, size, stride, *rest) -> torch.Tensor:
    if math.prod(size) > max(storage.numel(), 2**20):
        raise InputError("it holds a tensor that repeats its numbers too often")
    return storage.as_strided(size, stride, offset)  # PyTorch checks the bounds


def _tensor_of_type(storage, offset, size, stride, requires_grad, hooks, dtype, *rest) -> torch.Tensor:
    return _tensor(storage.view(dtype), offset, size, stride)


def _tensor_of_class(rebuild, kind, args, state):
    """A subclass of Tensor, or a tensor with attributes."""
    return rebuild(*args) if rebuild in (_tensor, _tensor_of_type) and isinstance(args, tuple) else Unknown()


_STORAGES = {  # the names that PyTorch gives to storages of its types
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8, "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}
_CLASSES = {  # every class and function that a file may name, and what is called in its place
    "collections.OrderedDict": _Mapping,
    "collections.defaultdict": lambda *args: {},
    "yacs.config.CfgNode": _Mapping,
    "torch.Size": lambda sizes=(): sizes if isinstance(sizes, tuple) else Unknown(),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": lambda tensor, *rest: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *rest: tensor,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_class,
}


def _first_line(error: Exception) -> str:
    return printable(next(iter(str(error).splitlines()), type(error).__name__))[:300]
