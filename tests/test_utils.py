"""Errors, files that appear whole or not at all, text for terminals."""

import errno
import os
import stat

import pytest

import main
from tests.helpers import arguments
from utils import (
    InputError,
    MissingFileError,
    RunError,
    check_place,
    csv_cell,
    exit_status,
    input_errors,
    one_line_errors,
    printable,
    replacing,
    write_text,
)

# ---- errors ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, status", [
    (InputError("a"), 2),
    (MissingFileError("a"), 2),
    (OSError(errno.ENOSPC, "No space left on device"), 2),
    (PermissionError(errno.EACCES, "Permission denied"), 2),
    (OSError(errno.EIO, "Input/output error"), 2),
    (RunError("a"), 1),
    (FloatingPointError("a"), 1),
    (OSError("a"), None),
    (FileNotFoundError(errno.ENOENT, "No such file or directory"), None),
    (KeyError("a"), None),
    (RuntimeError("a"), None),
])
def test_exit_status(error, status):
    assert exit_status(error) == status


def test_a_tool_ends_in_one_line_or_with_its_traceback(capsys):
    @one_line_errors
    def tool(argv):
        raise argv

    assert tool(InputError("x.yaml: wrong")) == 2
    assert capsys.readouterr().err == "test_utils.py: x.yaml: wrong\n"
    assert tool(InputError("a\x1b[31m\udcff.yaml: wrong:\n  b")) == 2
    assert capsys.readouterr().err == "test_utils.py: a\\x1b[31m\\udcff.yaml: wrong:\n  b\n"
    with pytest.raises(KeyError):
        tool(KeyError("a bug"))


@pytest.mark.parametrize("bug", [KeyError("a"), RuntimeError("a bug of words: out of memory"), TypeError("a")])
def test_a_bug_in_a_run_shows_its_traceback(bug, tmp_path, monkeypatch):
    def fail(*args):
        raise bug

    monkeypatch.setattr(main.inference, "build_network", fail)
    with pytest.raises(type(bug)):
        main.main(arguments(tmp_path))


# ---- files -----------------------------------------------------------------------------------------

def test_a_file_is_replaced_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path, "w", encoding="utf-8") as file:
        file.write("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), replacing(path) as file:
        file.write(b"half")
        raise OSError("full")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("name", ["a.txt", ".a.txt.tmp"])
def test_links_are_not_followed(name, tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / name).symlink_to("victim")
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "victim").read_text() == "mine" and (tmp_path / "a.txt").read_text() == "new"
    assert not (tmp_path / "a.txt").is_symlink()


def test_a_place_that_is_opened_for_writing_is_what_a_run_has_put_there(tmp_path):
    """A link would lead elsewhere, and to open a pipe takes for ever."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name in ("file", "new"):
        check_place(tmp_path / name)
    for name in ("folder", "new"):
        check_place(tmp_path / name, is_folder=True)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "link to a folder").symlink_to("folder")
    for name, is_folder, kind in [
        ("folder", False, "not a regular file"), ("pipe", False, "not a regular file"), ("link", False, "a link"),
        ("dangling", False, "a link"), ("dangling", True, "a link"), ("link to a folder", True, "a link"),
        ("file", True, "not a folder"),
    ]:
        with pytest.raises(InputError, match=f"{name} is {kind}"):
            check_place(tmp_path / name, is_folder)


def test_text_of_names_that_are_not_utf8(tmp_path):
    write_text(tmp_path / "a.txt", os.fsdecode(b"b\xff.jpg") + "ä")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "b\\udcff.jpgä"


# ---- text ------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "expected"), [
    ("a cat, ä 漢 🐈", "a cat, ä 漢 🐈"),
    ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
    ("two\nlines\r\t", r"two\nlines\r\t"),
    ("\u202eright to left", r"\u202eright to left"),
    (os.fsdecode(b"\xff.jpg"), r"\udcff.jpg"),
    ("\x9b31m\x00", r"\x9b31m\x00"),
])
def test_printable(text, expected):
    assert printable(text) == expected
    assert printable(expected) == expected and expected.encode()


@pytest.mark.parametrize(("text", "expected"), [
    ("=1+1", "'=1+1"), ("+1", "'+1"), ("-1", "'-1"), ("@SUM(A1)", "'@SUM(A1)"), ("'=1", "'=1"), ("a=1", "a=1"),
    ("", ""), ("\t=1", r"\t=1"), ("\n=1", r"\n=1"),
])
def test_csv_cell(text, expected):
    assert csv_cell(text) == expected
    assert csv_cell(expected) == expected


def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch):
    sync = os.fsync

    def refuse_folders(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(number)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"


def test_input_errors_name_their_source():
    with pytest.raises(InputError, match="^a.pth: too large$"), input_errors("a.pth"):
        raise ValueError("too large")
    with pytest.raises(KeyError), input_errors("a.pth"):
        raise KeyError("a bug")
