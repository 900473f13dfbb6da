import argparse
import codecs
import contextlib
import errno
import io
import os
import pickle
import random
import resource
import struct
import subprocess
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from yacs.config import CfgNode

import checkpoint
from models import model_state_dict
from tests.helpers import another_run
from tests.processes import run
from utils import InputError


def content(step=1):
    generator = torch.Generator().manual_seed(step)
    return {"model": {"w": torch.randn(50, 40, generator=generator)}, "step": step, "rng": [(3, (1, 2), None)]}


def saved(path, value):
    torch.save(value, path)
    return path


# ---- what is loaded --------------------------------------------------------------------------------

def test_own_checkpoint_loads_with_weights_only(tmp_path):
    checkpoint.save_file(content(), tmp_path / "a.pth")
    for loaded in (torch.load(tmp_path / "a.pth", weights_only=True), checkpoint.load_file(tmp_path / "a.pth")):
        assert torch.equal(loaded["model"]["w"], content()["model"]["w"])
        assert loaded["rng"] == content()["rng"]


@pytest.mark.parametrize("new_format", [True, False])
def test_released_checkpoint_with_a_pickled_config(tmp_path, new_format):
    config = CfgNode({"MODEL": {"NAME": "smlp_tiny", "DEPTHS": [2, 2, 6, 2]}, "SEED": 0})
    config.freeze()
    weights = OrderedDict({"blocks1.0.token_mixing.smlp_block.BN.weight": torch.arange(3.0)})
    path = tmp_path / "released.pth"
    torch.save({"model": weights, "config": config, "epoch": 299, "max_accuracy": 81.2}, path,
               _use_new_zipfile_serialization=new_format)
    loaded = checkpoint.load_file(path)
    assert loaded["config"] == {"MODEL": {"NAME": "smlp_tiny", "DEPTHS": [2, 2, 6, 2]}, "SEED": 0}
    assert type(loaded["config"]) is dict and type(loaded["config"]["MODEL"]) is dict
    assert loaded["max_accuracy"] == 81.2
    key, = model_state_dict(loaded)
    assert key == "stages.0.0.token_mixing.cgsmm.norm.weight"


class Malicious:
    """Runs a command when it is unpickled without restrictions."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("function", [os.system, eval, open, subprocess.Popen, print, exec, codecs.encode])
def test_what_a_network_does_not_need_is_inert_and_the_weights_load(tmp_path, function, new_format):
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    argument = f"open({str(marker)!r}, 'w')" if function in (eval, exec) else f"touch {marker}"
    content = {"model": {"w": torch.ones(2)}, "config": Malicious(function, argument), "epoch": np.float64(3)}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    loaded = checkpoint.load_file(path)
    assert loaded["model"]["w"].tolist() == [1, 1] and not marker.exists()
    assert isinstance(loaded["config"], checkpoint.Unknown) and isinstance(loaded["epoch"], checkpoint.Unknown)


@pytest.mark.parametrize("value", [
    argparse.Namespace(lr=0.1), np.zeros(3), {1, 2}, bytearray(3), b"bytes", Path("a"), Counter("aab"), slice(1),
    1 + 2j,    torch.zeros(2, 2).to_sparse(), torch.nn.Linear(1, 1), torch.device("cpu"), 2**70,
])
def test_objects_of_other_trainers_stand_beside_the_weights(tmp_path, value):
    path = saved(tmp_path / "a.pth", {"model": content()["model"], "args": value, "in": [value]})
    loaded = checkpoint.load_file(path)
    assert torch.equal(loaded["model"]["w"], content()["model"]["w"])
    assert all(isinstance(found, checkpoint.Unknown) for found in (loaded["args"], *loaded["in"]))


@pytest.mark.parametrize("new_format", [True, False])
def test_tensors_of_every_kind_are_what_was_saved(tmp_path, new_format):
    base, generator = torch.arange(24.0), torch.Generator().manual_seed(0)
    tensors = {str(dtype): torch.randn(3, 4, generator=generator).to(dtype) for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool)}
    tensors |= {"view": base[3:9], "strided": base.view(4, 6).t()[::2], "expanded": base[:1].expand(3, 2),
                "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "parameter": torch.nn.Parameter(base[:2]),
                "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    if new_format:
        tensors["float8"] = torch.ones(3).to(torch.float8_e4m3fn)
    torch.save(tensors, tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
    for key, value in checkpoint.load_file(tmp_path / "a.pth").items():
        assert type(value) is torch.Tensor and value.dtype == tensors[key].dtype
        assert torch.equal(value.double(), tensors[key].detach().double()), key
        assert value.numel() == 0 or value.untyped_storage().nbytes() == value.nbytes


class Allocates:
    """Pickles that claim memory: the global bytearray, a buffer, repeated numbers."""

    def __init__(self, how):
        self.how = how

    def __reduce__(self):
        big = 4 * 10**9
        return {"bytearray": (bytearray, (big,)), "list": (list, (range(big),)),
                "tensor": (torch._utils._rebuild_tensor_v2,
                           (torch.ones(1).storage(), 0, (big,), (0,), False, OrderedDict()))}[self.how]


@pytest.mark.parametrize("how", ["bytearray", "list", "tensor"])
@pytest.mark.parametrize("new_format", [True, False])
def test_a_small_file_does_not_allocate_much(tmp_path, how, new_format):
    path = tmp_path / "a.pth"
    torch.save({"model": {"w": torch.ones(2)}, "x": Allocates(how)}, path, _use_new_zipfile_serialization=new_format)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(checkpoint.CheckpointError):
        checkpoint.load_file(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def raw(content: bytes) -> dict:
    return {"tail": content + b"PK\5\6", "end record": content + b"PK\5\6" + bytes(18),
            "comment": content[:-2] + b"\1\0x", "prefix": b"x" + content,
            "twice": content + content, "byte": content + b"\0", "cut": content[:-1]}


@pytest.mark.parametrize("how", raw(b"xx"))
@pytest.mark.parametrize("new_format", [True, False])
def test_a_file_is_strictly_one_of_the_formats(tmp_path, how, new_format):
    path = tmp_path / "a.pth"
    torch.save(content(), path, _use_new_zipfile_serialization=new_format)
    checkpoint.load_file(path)
    path.write_bytes(raw(path.read_bytes())[how])
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load_file(path)


@pytest.mark.parametrize("program, problem", [
    (b"\x80\x05\x96" + (10**10).to_bytes(8, "little") + b".", "an operation that no checkpoint"),
    (b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "Unknown, not a mapping"),
    (b"\x80\x02}(K\x01]tr\xff\xff\xff\x7fR.", "."),
    (b"\x80\x02" + b"]" * 40 + b"a" * 39 + b".", "list, not a mapping"),
    (b"\x80\x02}X\x01\x00\x00\x00a" + b"]" * 40 + b"a" * 39 + b"s.", "nested more than 32"),
    (b"\x80\x02}(" + b"".join(b"K" + bytes([i]) + b"}" for i in range(9)) + b"u.", None),
])
def test_hand_made_pickles(tmp_path, program, problem):
    checkpoint.save_file(content(), tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as source, zipfile.ZipFile(tmp_path / "b.pth", "w") as target:
        for name in source.namelist():
            target.writestr(name, program if name.endswith("data.pkl") else source.read(name))
    if problem is None:
        assert checkpoint.load_file(tmp_path / "b.pth") == {i: {} for i in range(9)}
    else:
        with pytest.raises(checkpoint.CheckpointError, match=problem):
            checkpoint.load_file(tmp_path / "b.pth")


def test_plain_pickle_and_torchscript_are_refused(tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Malicious(os.system, f"touch {marker}")))
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pth"))
    for name in ("plain.pth", "script.pth"):
        with pytest.raises(checkpoint.CheckpointError, match=name):
            checkpoint.load_file(tmp_path / name)
    assert not marker.exists()


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A pickle with bytes flipped, inserted, removed or repeated, or with another global in place of its own."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at:at] = rng.randbytes(rng.randrange(1, 8))
            case 2:
                del data[at:at + rng.randrange(1, 20)]
            case 3:
                data[at:at] = data[at:at + rng.randrange(1, 60)]
            case 4:
                data[at:at] = b"cposix\nsystem\n(X\x0d\x00\x00\x00touch markertR"
    return bytes(data)


FUZZ = """
import io, random, sys, zipfile, json
from pathlib import Path
import checkpoint
from tests.test_checkpoint import mutate, rezip
folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
touched = []
def audit(event, args):
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.fork", "os.posix_spawn", "socket.connect", "os.remove",
                 "os.rename", "shutil.rmtree") or event == "open" and set(str(args[1])) & set("wax+"):
        touched.append((event, str(args)))
original = (folder / "original.pth").read_bytes()
expected = checkpoint.load_file(folder / "original.pth")
outcomes = {"refused": 0, "same": 0, "other": 0}
armed = False
sys.addaudithook(lambda event, args: audit(event, args) if armed else None)
for seed in range(first, last):
    (folder / "mutated.pth").write_bytes(rezip(original, random.Random(seed)))
    armed = True
    try:
        loaded = checkpoint.load_file(folder / "mutated.pth")
        outcome = "same" if str(loaded) == str(expected) else "other"
    except checkpoint.CheckpointError as error:
        assert "mutated.pth" in str(error)
        outcome = "refused"
    armed = False
    outcomes[outcome] += 1
print(json.dumps({"touched": touched, **outcomes}))
"""


def rezip(original: bytes, rng: random.Random) -> bytes:
    """The same archive around a mutated pickle, its checksums put right, so that the unpickler itself is tried."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(original)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, mutate(data, rng) if name.endswith("data.pkl") else data)
    return out.getvalue()


def fuzz(folder, first, last):
    config = CfgNode({"MODEL": {"NAME": "x", "DEPTHS": [2, 2]}, "SEED": 0})
    saved(folder / "original.pth", {
        "model": OrderedDict(a=torch.arange(12.0).view(3, 4), b=torch.ones(2, dtype=torch.int64)),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "config": config, "epoch": 3, "max_accuracy": 81.25,
    })
    result = run(["-c", FUZZ, folder, first, last], timeout=900, folder=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    report = __import__("json").loads(result.stdout.splitlines()[-1])
    assert report["touched"] == []
    assert not (folder / "marker").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["mutated.pth", "original.pth"]
    return report


def test_fuzzed_pickles(tmp_path):
    report = fuzz(tmp_path, 0, 300)
    assert sum(report[key] for key in ("refused", "same", "other")) == 300 and report["refused"] > 150


@pytest.mark.slow
def test_many_fuzzed_pickles(tmp_path):
    report = fuzz(tmp_path, 1000, 6000)
    assert report["refused"] > 2500
    print(report)


# ---- what is saved ---------------------------------------------------------------------------------

def damage_flip(path):
    data = bytearray(path.read_bytes())
    record = data.find(struct.pack("<f", content()["model"]["w"].flatten()[100].item()))
    data[record] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut by one byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "one bit flipped": damage_flip,
    "foreign": lambda path: path.write_text("not a checkpoint"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a bare tensor": lambda path: saved(path, torch.zeros(3)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_newest_checkpoint_is_skipped(tmp_path, caplog, monkeypatch, damage):
    monkeypatch.setattr(checkpoint.logger, "propagate", True)
    for step in (9, 10, 100):  # by step, not by name's length or file time
        checkpoint.save_checkpoint(content(1), tmp_path, is_best=False, keep=9)
        os.rename(tmp_path / "ckpt_step_00000001.pth", tmp_path / f"ckpt_step_{step:08d}.pth")
    os.utime(tmp_path / "ckpt_step_00000009.pth")
    newest = tmp_path / "ckpt_step_00000100.pth"
    assert checkpoint.newest_checkpoint(tmp_path)[0] == newest
    damage(newest)
    with pytest.raises(checkpoint.CheckpointError, match="ckpt_step_00000100.pth"):
        checkpoint.load_file(newest)
    assert checkpoint.newest_checkpoint(tmp_path)[0].name == "ckpt_step_00000010.pth"
    assert "skipping a checkpoint" in caplog.text and "ckpt_step_00000100.pth" in caplog.text
    args = [record.args for record in caplog.records if record.msg.startswith("skipping")]
    assert {type(arg) for arg, in args} == {str}  # an exception would keep all that was read as long as the record


ODD_FILES = {
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "link to nothing": lambda path: path.symlink_to("gone.pth"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("make", ODD_FILES.values(), ids=ODD_FILES.keys())
def test_what_is_no_regular_file_is_skipped(tmp_path, caplog, monkeypatch, make):
    monkeypatch.setattr(checkpoint.logger, "propagate", True)
    checkpoint.save_checkpoint(content(9), tmp_path, is_best=False, keep=9)
    make(tmp_path / "ckpt_step_00000100.pth")
    make(tmp_path / "ckpt_step_00000001.pth")
    assert checkpoint.newest_checkpoint(tmp_path)[0].name == "ckpt_step_00000009.pth"
    assert "skipping a checkpoint" in caplog.text and "ckpt_step_00000100.pth is not a regular file" in caplog.text
    checkpoint.set_aside_after(9, tmp_path)
    checkpoint.save_checkpoint(content(10), tmp_path, is_best=True, keep=1)  # pruning too
    assert checkpoint.newest_checkpoint(tmp_path)[0].name == "ckpt_step_00000010.pth"


def test_a_link_in_the_place_of_a_new_file_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("best.pth", ".best.pth.tmp", "ckpt_step_00000001.pth", ".ckpt_step_00000001.pth.tmp"):
        (tmp_path / name).symlink_to(victim)
    checkpoint.save_checkpoint(content(1), tmp_path, is_best=True, keep=1)
    assert victim.read_text() == "mine"
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises(InputError, match=r"\.lock is a link"):
        checkpoint.lock_folder(tmp_path)
    assert victim.read_text() == "mine"


def test_compressed_records_are_refused(tmp_path):
    """A few bytes of them could hold gigabytes."""
    checkpoint.save_file(content(), tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as source:
        with zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as target:
            for name in source.namelist():
                target.writestr(name, source.read(name))
    with pytest.raises(checkpoint.CheckpointError, match=r"b\.pth: it is not an archive as PyTorch writes it"):
        checkpoint.load_file(tmp_path / "b.pth")


def test_no_good_checkpoint_is_an_error(tmp_path):
    assert checkpoint.newest_checkpoint(tmp_path) is None
    (tmp_path / "ckpt_step_00000001.pth").write_bytes(b"x")
    with pytest.raises(checkpoint.CheckpointError, match="none of the 1 checkpoints"):
        checkpoint.newest_checkpoint(tmp_path)


def test_every_flipped_bit_of_the_weights_is_found(tmp_path):
    checkpoint.save_file(content(), tmp_path / "a.pth")
    original = (tmp_path / "a.pth").read_bytes()
    start = original.find(content()["model"]["w"].numpy().tobytes())
    rng = random.Random(0)
    for _ in range(100):
        data = bytearray(original)
        data[start + rng.randrange(8000)] ^= 1 << rng.randrange(8)
        (tmp_path / "b.pth").write_bytes(data)
        with pytest.raises(checkpoint.CheckpointError, match="checksum"):
            checkpoint.load_file(tmp_path / "b.pth")


def test_best_and_pruning(tmp_path):
    for step, is_best in [(1, True), (2, True), (3, False), (4, False), (5, False)]:
        checkpoint.save_checkpoint(content(step), tmp_path, is_best, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.pth", "ckpt_step_00000004.pth", "ckpt_step_00000005.pth"]
    assert checkpoint.load_file(tmp_path / "best.pth")["step"] == 2


def test_best_without_hard_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.save_checkpoint(content(7), tmp_path, is_best=True, keep=2)
    assert checkpoint.load_file(tmp_path / "best.pth")["step"] == 7


def test_full_disk_leaves_everything_as_it_was(tmp_path, monkeypatch):
    checkpoint.save_checkpoint(content(1), tmp_path, is_best=True, keep=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    for error in (OSError(28, "No space left on device"), RuntimeError("[enforce fail] unexpected pos")):
        def fail(value, file, error=error):
            file.write(b"half")
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", fail)
            with pytest.raises(OSError):
                checkpoint.save_checkpoint(content(2), tmp_path, is_best=True, keep=2)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_lock(tmp_path):
    with another_run(tmp_path) as holder, pytest.raises(ValueError, match=f"in use by another run.*{holder.pid}"):
        checkpoint.lock_folder(tmp_path)
    checkpoint.lock_folder(tmp_path).close()  # the other one was killed


def test_lock_is_not_kept_by_forked_children(tmp_path):
    """The data workers of a killed run live on for seconds; they must not keep its folder locked."""
    script = ("import checkpoint, os, sys, time; lock = checkpoint.lock_folder(sys.argv[1])\n"
              "if os.fork() == 0: time.sleep(60)\n"
              "else: os.kill(os.getpid(), 9)")
    parent = run(["-c", script, tmp_path])
    try:
        assert parent.returncode == -9 and len(parent.living()) == 1
        checkpoint.lock_folder(tmp_path).close()
    finally:
        parent.kill()


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(checkpoint.logger, "propagate", True)
    monkeypatch.setattr(checkpoint.fcntl, "lockf", refuse)
    checkpoint.lock_folder(tmp_path).close()
    assert "No locks available): make sure that no second run writes into it" in caplog.text
