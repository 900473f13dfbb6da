"""Files appear whole or not at all, and never through a link."""

import os

import pytest

from files import replacing, write_text


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


def test_text_of_names_that_are_not_utf8(tmp_path):
    write_text(tmp_path / "a.txt", os.fsdecode(b"b\xff.jpg") + "ä")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "b\\udcff.jpgä"
