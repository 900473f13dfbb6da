"""Files appear whole or not at all, and never through a link."""

import os

import pytest

from files import check_place, replacing, write_text
from models.errors import InputError


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
