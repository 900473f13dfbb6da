import io
import pickle
import random
import zipfile

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from data import zipped
from data.images import ImageError
from data.zipped import ZipDataset, read_map
from utils import InputError


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 255 - value)).save(file, "PNG")
    return file.getvalue()


def write_split(root, split="train", classes=("cat", "dog"), per_class=5, compression=zipfile.ZIP_STORED):
    """``per_class`` images of each class; image i (in the order of the map) has the red value i."""
    lines = []
    with zipfile.ZipFile(root / f"{split}.zip", "w", compression) as archive:
        for label, name in enumerate(classes):
            for _ in range(per_class):
                member = f"{name}/{len(lines)}.png"
                archive.writestr(member, png(len(lines)))
                lines.append(f"{member}\t{label}\n")
    (root / f"{split}_map.txt").write_text("".join(lines))


def red(dataset) -> list[int]:
    return [dataset[index][0].getpixel((0, 0))[0] for index in range(len(dataset))]


@pytest.mark.parametrize("cache", ["no", "part", "full"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_images_labels_and_classes(cache, compression, tmp_path):
    write_split(tmp_path, compression=compression)
    dataset = ZipDataset(tmp_path, "train", 2, cache, rank=1, world_size=3)
    assert red(dataset) == list(range(10))
    assert [dataset[index][1] for index in range(10)] == [0] * 5 + [1] * 5
    assert dataset.classes == ["cat", "dog"]


@pytest.mark.parametrize(("cache", "held"), [("no", []), ("part", [1, 4, 7]), ("full", list(range(10)))])
def test_the_cache_holds_what_it_says(cache, held, tmp_path, monkeypatch):
    write_split(tmp_path)
    dataset = ZipDataset(tmp_path, "train", 2, cache, rank=1, world_size=3)
    read = []
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda _, member: read.append(member) or png(0))
    for index in range(10):
        dataset[index]
    assert read == [member for index, member in enumerate(dataset.names) if index not in held]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_workers_and_pickles_read_the_same_images(tmp_path):
    write_split(tmp_path, per_class=100)
    dataset = ZipDataset(tmp_path, "train", 2)
    dataset[0]  # the handle is open before the fork
    loader = DataLoader(dataset, batch_size=1, num_workers=3, collate_fn=lambda batch: batch[0][0].getpixel((0, 0))[0])
    assert list(loader) == [index % 256 for index in range(200)]
    assert red(pickle.loads(pickle.dumps(dataset))) == list(range(200))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"train_map\.txt is empty"),
        ("cat/0.png\t0\ncat/1.png 0\n", r"train_map\.txt:2: expected 'path/in/zip\.jpg<TAB>label', got 'cat/1\.png 0'"),
        ("cat/0.png\t0\n\ncat/1.png\t0\n", r"train_map\.txt:2: expected"),
        ("\t0\n", r"train_map\.txt:1: expected"),
        ("cat/0.png\tcat\n", r"train_map\.txt:1: expected"),
        ("cat/0.png\t-1\n", r"train_map\.txt:1: expected"),
        ("cat/0.png\t0\ncat/1.png\t2\n", r"train_map\.txt:2: label 2 is not in 0\.\.1 \(MODEL\.NUM_CLASSES is 2\)"),
        ("cat/0.png\t0\ncat/1.png\t1\ncat/0.png\t1\n", r"train_map\.txt: cat/0\.png is in 2 lines; keep"),
        ("cat/0.png\t" + "9" * 5000, r"train_map\.txt:1: expected"),
        ("cat/0.png\t1\n", r"train_map\.txt: no image has label 0, though labels go up to 1"),
        ("cat/0.png\t0\ncat/99.png\t1\n", r"train_map\.txt:2: cat/99\.png is not in .*train\.zip"),
    ],
)
def test_faults_of_the_map(text, message, tmp_path):
    write_split(tmp_path)
    (tmp_path / "train_map.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        ZipDataset(tmp_path, "train", 2)


def test_missing_files(tmp_path):
    write_split(tmp_path)
    (tmp_path / "train.zip").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.zip does not exist"):
        ZipDataset(tmp_path, "train", 2)
    with pytest.raises(FileNotFoundError, match=r"val_map\.txt does not exist; it holds one line"):
        ZipDataset(tmp_path, "val", 2)


def test_an_incomplete_archive(tmp_path):
    write_split(tmp_path)
    data = (tmp_path / "train.zip").read_bytes()
    (tmp_path / "train.zip").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"train\.zip is not a complete zip archive"):
        ZipDataset(tmp_path, "train", 2)


def test_a_damaged_member_is_named(tmp_path):
    write_split(tmp_path)
    data = bytearray((tmp_path / "train.zip").read_bytes())
    data[data.find(png(3)) + 20] ^= 1
    (tmp_path / "train.zip").write_bytes(data)
    message = r"train\.zip:cat/3\.png cannot be read from the archive \(Bad CRC-32"
    with pytest.raises(ImageError, match=message):
        ZipDataset(tmp_path, "train", 2)[3]
    with pytest.raises(ImageError, match=f"{message}.* --opts DATA.SKIP_BAD_IMAGES True"):
        ZipDataset(tmp_path, "train", 2, "full")
    dataset = ZipDataset(tmp_path, "train", 2, "full", skip_bad=True)
    assert dataset[4][1] == 0
    with pytest.raises(ImageError, match=message):
        dataset[3]


def test_a_member_that_is_no_image_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("cat/0.png", "hello")
    (tmp_path / "train_map.txt").write_text("cat/0.png\t0\n")
    with pytest.raises(ImageError, match=r"train\.zip:cat/0\.png is not an image"):
        ZipDataset(tmp_path, "train", 1)[0]


@pytest.mark.parametrize(
    ("members", "classes"),
    [
        (["x/cat/0.jpg", "x/dog/0.jpg"], ["cat", "dog"]),
        (["0.jpg", "1.jpg"], ["0", "1"]),  # no folders
        (["all/0.jpg", "all/1.jpg"], ["0", "1"]),  # one folder for both
        (["cat/0.jpg", "dog/0.jpg", "puma/1.jpg"], ["0", "1"]),  # two folders for label 0
    ],
)
def test_classes_are_named_by_folder_where_that_is_unambiguous(members, classes, tmp_path):
    labels = [0, 1, 0][: len(members)]
    lines = [f"{member}\t{label}\n" for member, label in zip(members, labels, strict=True)]
    (tmp_path / "map.txt").write_text("".join(lines))
    assert read_map(tmp_path / "map.txt", 1000) == (members, labels, classes)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    write_split(tmp_path)
    path = tmp_path / "train_map.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert red(ZipDataset(tmp_path, "train", 2)) == list(range(10))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_mutated_archives_are_input_errors(compression, tmp_path):
    """Damaged data, names and directories: the whole image or an error."""
    write_split(tmp_path, per_class=2, compression=compression)
    path, rng = tmp_path / "train.zip", random.Random(0)
    data, whole = path.read_bytes(), [png(i) for i in range(4)]
    for _ in range(60):
        spoilt = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            begin = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(len(data) * 2 // 3, len(data))
            spoilt[begin : begin + rng.choice((1, 2, 4))] = rng.choice((rng.randbytes(4), b"\xff" * 4, bytes(4)))
        path.write_bytes(spoilt)
        zipped._open_archive.cache_clear()
        try:
            dataset = ZipDataset(tmp_path, "train", 2)
        except InputError:
            continue
        for i in range(4):
            try:
                assert dataset.read(i) == whole[i]
            except InputError as error:
                assert str(error).isprintable()


def test_a_member_that_unpacks_to_more_than_an_image_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(zipped, "MOST_BYTES", 10)
    write_split(tmp_path)
    with pytest.raises(ImageError, match=r"cat/0.png cannot be read .* .it has \d+ bytes; the limit is 10"):
        ZipDataset(tmp_path, "train", 2).read(0)
