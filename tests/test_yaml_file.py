"""YAML that would hide a mistake, hang or fill the memory is refused, in one line that names the place."""

import pytest

from models import InputError
from yaml_file import MAX_BYTES, read_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(9 * [f'*{before}'])}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True))


def test_plain_values(tmp_path):
    (tmp_path / "a.yaml").write_text("A: {B: [1, 2.5, x, 'ä'], C: true}\nD:\n  - E: null\n")
    assert read_yaml(tmp_path / "a.yaml") == {"A": {"B": [1, 2.5, "x", "ä"], "C": True}, "D": [{"E": None}]}
    (tmp_path / "a.yaml").write_text("")
    assert read_yaml(tmp_path / "a.yaml") is None


@pytest.mark.parametrize(("text", "message"), [
    ("SEED: 1\nTAG: a\nSEED: 2\n", "line 3: the key SEED occurs twice"),
    ("TRAIN: {EPOCHS: 1, EPOCHS: 1}", "line 1: the key EPOCHS occurs twice"),
    ("a: &x 1\nb: *x\n", r"line 2: aliases \(\*name\) are not supported"),
    ("a: &x {b: 1}\nc:\n  <<: *x\n", "line 3: aliases"),
    (BOMB, "line 2: aliases"),
    ("a: &x [*x]", "line 1: aliases"),
    ("[" * 10_000, "line 1: values are nested more than 20 deep"),
    ("".join(f"{' ' * i}a:\n" for i in range(1000)), "values are nested more than 20 deep"),
    ("a: " + "9" * 10_000, "Exceeds the limit"),
    ("a: 2001-99-99", "month"),
    ("a: [", "line 1: "),
    ("a: !!python/object/apply:os.system ['ls']", "line 1: could not determine a constructor"),
    ("a: \x00", "special characters are not allowed"),
    ("a: b\n" * (MAX_BYTES // 4), "too many for a file of settings"),
    ("? [a, b]\n: c", "line 1: found unhashable key"),
])
def test_refused(text, message, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=f"a.yaml .*{message}") as error:
        read_yaml(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"a: \xff")
    with pytest.raises(InputError, match="'utf-8' codec can't decode"):
        read_yaml(tmp_path / "a.yaml")
