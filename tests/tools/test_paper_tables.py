"""Tables from made-up runs of known numbers: the exact cells."""

import json
import shutil

import pytest
import torch
import yaml

from config import flat_keys, load_config, to_dict
from models import build_model
from tests.helpers import DIGITS, TINY
from tests.processes import ROOT
from tools import paper_tables

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = {
    "first": {"name": "First", "config": DIGITS.stem, "opts": TINY, "paper": [90.5, 99]},
    "second": {"name": "Second", "config": DIGITS.stem, "opts": [*TINY, "MODEL.STRIP_MLP.STRIP_WIDTH", 1], "paper": 80},
    "baseline": {"name": "ResNet", "config": DIGITS.stem, "opts": [
        *TINY, "MODEL.TYPE", "timm", "MODEL.ARCH", "resnet18", "MODEL.TIMM_KWARGS", "{channels: [8, 8, 8, 8]}"]},
}
HEADER = ("| network | params (M) | MACs (G) | top-1 | paper's top-1 | top-1 difference | top-5 | paper's top-5 | "
          "top-5 difference | best | seeds | batch | commit |")


@pytest.fixture
def tables(tmp_path, capsys, monkeypatch):
    """``tables(*flags)``: status, standard output and error of the tool on the rows above and the runs in runs/."""
    path = tmp_path / "tables.yaml"
    path.write_text(yaml.safe_dump({"tiny": {"title": "A title", "rows": ROWS}}, sort_keys=False))
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        status = paper_tables.main([*flags, "--tables", str(path), *(() if "--runs" in flags else ("--runs", "runs"))])
        return status, *capsys.readouterr()

    return call


def config_of(row, *opts):
    return to_dict(load_config(DIGITS, [*ROWS[row]["opts"], *opts]))


def add_run(root, row, name, accuracies, *opts, commit=COMMIT, batch=200, kind="eval_ema"):
    """A training with these top-1 figures, one an epoch; top-5 is 5 above each."""
    folder = root / "runs" / name
    folder.mkdir(parents=True)
    config = config_of(row, "OUTPUT", "/private/place", "DATA.DATA_PATH", "/private/data", *opts)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    about = {"git_commit": commit, "effective_batch": batch, "command": "main.py --data-path /private/data"}
    (folder / "run.yaml").write_text(yaml.safe_dump(about))
    records = [{"kind": "train", "step": 1, "epoch": 0, "epochs": 0.1, "loss": 2.0, "lr": 0.1}]
    for epoch, accuracy in enumerate(accuracies):
        where = {"step": 7, "epoch": epoch, "epochs": epoch + 1, "loss": 1.0}
        records.append({"kind": "eval", **where, "acc1": 1.0, "acc5": 2.0})
        records.append({"kind": kind, **where, "acc1": accuracy, "acc5": accuracy + 5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def add_evaluation(root, row, name, acc1, sha, *opts):
    folder = root / "runs" / name
    folder.mkdir(parents=True)
    (folder / "eval.json").write_text(json.dumps({
        "eval": {"acc1": acc1, "acc5": 99.5}, "sha256": sha, "config": config_of(row, *opts), "environment":
        {"git_commit": f"{COMMIT}-dirty"},
    }))


def cells(output, network):
    header, _, *lines = [line[2:-2].split(" | ") for line in output.splitlines() if line.startswith("|")]
    (line,) = [line for line in lines if line[0] == network]
    return dict(zip(header, line, strict=True))


def statistics(row):
    """Parameters and multiply-accumulates in the table's units."""
    config = load_config(DIGITS, ROWS[row]["opts"])
    with torch.device("meta"):
        model = build_model(config)
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}"


def test_without_any_run_every_cell_says_so(tables):
    status, output, error = tables()
    assert (status, error) == (0, "")
    assert output.startswith(f"## A title\n\n{HEADER}\n| --- | --- |")
    assert output.count("not measured yet") == 6  # top-1 and top-5 of three networks
    first = cells(output, "First")
    assert (first["params (M)"], first["top-1"], first["paper's top-1"], first["paper's top-5"]) == (
        statistics("first"), "not measured yet", "90.50", "99.00")
    assert first["top-1 difference"] == first["best"] == first["seeds"] == first["commit"] == ""


def test_seeds_are_averaged(tables, tmp_path):
    add_run(tmp_path, "first", "a/x/seed0", [93.0, 90.0])
    add_run(tmp_path, "first", "a/x/seed1", [80.0, 91.0], "SEED", 1, batch=400)
    add_run(tmp_path, "first", "elsewhere", [10.0, 95.0], "SEED", 2, "MODEL.NAME", "whatever", commit=COMMIT + "-dirty")
    add_run(tmp_path, "second", "b", [79.125, 79.126], kind="eval")
    add_run(tmp_path, "baseline", "c", [60.0, 50.0])
    status, output, error = tables()
    assert (status, error) == (0, "")
    first = cells(output, "First")  # last epochs 90, 91, 95: mean 92, squares 4 + 1 + 9 over 2
    assert first["top-1"] == "92.00 ± 2.65" and first["top-1 difference"] == "+1.50"
    assert first["top-5"] == "97.00 ± 2.65" and first["top-5 difference"] == "-2.00"
    assert first["best"] == "93.00 ± 2.00"
    assert (first["seeds"], first["batch"], first["commit"]) == ("3", "200, 400", "0123456, 0123456-dirty")
    second = cells(output, "Second")
    assert (second["top-1"], second["top-1 difference"], second["seeds"]) == ("79.13", "-0.87", "1")
    baseline = cells(output, "ResNet")
    assert (baseline["top-1"], baseline["best"], baseline["top-1 difference"]) == ("50.00", "60.00", "")


def test_the_better_of_network_and_average_counts(tables, tmp_path):
    """As for the run's own "Best top-1"."""
    folder = add_run(tmp_path, "first", "a", [80.0, 70.0])
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"acc1": 1.0', '"acc1": 75.0'))  # the network's in both epochs
    (folder / "eval.json").write_text(json.dumps({
        "eval": {"acc1": 75.0, "acc5": 99.0, "loss": 1.0}, "eval_ema": {"acc1": 70.0, "acc5": 75.0, "loss": 0.9},
        "sha256": "ffff0000ee", "config": config_of("first"), "environment": {"git_commit": COMMIT}}))
    _, output, _ = tables()
    assert (cells(output, "First")["top-1"], cells(output, "First")["best"]) == ("75.00", "80.00")
    assert cells(output, "First, checkpoint ffff0000")["top-1"] == "75.00"


@pytest.mark.parametrize("opts, reason", [
    (["TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0],
     "the nearest is first, but it has TRAIN.EPOCHS 1 instead of 2, TRAIN.WARMUP_EPOCHS 0 instead of 1"),
    (["MODEL.STRIP_MLP.STRIP_WIDTH", 5], "it has MODEL.STRIP_MLP.STRIP_WIDTH 5 instead of 3"),
    (["MODEL.PRETRAINED", "w.pth"], "it has MODEL.PRETRAINED 'w.pth' instead of ''"),
])
def test_runs_of_another_recipe_are_left_out_and_named(tables, tmp_path, opts, reason):
    add_run(tmp_path, "first", "other", [90.0] * (1 if "TRAIN.EPOCHS" in opts else 2), *opts)
    status, output, error = tables()
    assert status == 0 and output.count("not measured yet") == 6
    assert error.startswith("runs/other is in no table") and reason in error


def test_unfinished_and_repeated_runs(tables, tmp_path):
    add_run(tmp_path, "first", "unfinished", [90.0])
    add_run(tmp_path, "second", "one", [81.0, 82.0])
    add_run(tmp_path, "second", "two", [1.0, 2.0])
    status, output, error = tables()
    assert cells(output, "First")["top-1"] == "not measured yet"
    assert (cells(output, "Second")["top-1"], cells(output, "Second")["seeds"]) == ("82.00", "1")
    assert error == "runs/two repeats seed 0 of runs/one and is skipped\n"


def test_evaluated_checkpoints_have_their_own_lines(tables, tmp_path):
    """What the training was like does not matter to an evaluation; what the network and the images are does."""
    add_evaluation(tmp_path, "first", "released", 90.25, "a1b2c3d4e5", "TRAIN.EPOCHS", 99, "SEED", 3)
    add_evaluation(tmp_path, "second", "own", 85.0, "ffff0000ee")
    add_run(tmp_path, "second", "trained", [80.0, 81.0])
    add_evaluation(tmp_path, "second", "trained/more", 86.0, "eeee0000ee", "TEST.CROP", True)
    _, output, error = tables()
    released = cells(output, "First, checkpoint a1b2c3d4")
    assert (released["top-1"], released["top-1 difference"], released["top-5"]) == ("90.25", "-0.25", "99.50")
    assert released["seeds"] == released["best"] == released["batch"] == ""
    assert "| First |" not in output
    assert cells(output, "Second, checkpoint ffff0000")["top-1"] == "85.00"
    assert cells(output, "Second")["top-1"] == "81.00"
    assert "runs/trained/more is in no table" in error and "TEST.CROP True instead of False" in error


def test_an_evaluation_in_the_folder_of_its_training_counts_beside_it(tables, tmp_path):
    """Where ``main.py --eval`` writes it."""
    folder = add_run(tmp_path, "first", "a", [10.0, 90.0])
    report = {"eval": {"acc1": 91.0, "acc5": 99.0}, "sha256": "ffff0000" * 8, "environment": {"git_commit": COMMIT},
              "config": config_of("first")}
    (folder / "eval.json").write_text(json.dumps(report))
    _, output, _ = tables()
    assert cells(output, "First")["top-1"] == "90.00"
    assert cells(output, "First, checkpoint ffff0000")["top-1"] == "91.00"


def test_a_run_whose_settings_changed_on_the_way_counts_for_no_row(tables, tmp_path):
    folder = add_run(tmp_path, "first", "a", [10.0, 90.0])
    about = yaml.safe_load((folder / "run.yaml").read_text())
    about["changes"] = [{"step": 7, "keys": {"TRAIN.EPOCHS": "1 -> 2"}}]
    (folder / "run.yaml").write_text(yaml.safe_dump(about))
    for names in ([], ["tiny"]):
        _, output, error = tables(*names)
        assert cells(output, "First")["top-1"] == "not measured yet"
        assert "runs/a is in no table; the nearest is first, but it has TRAIN.EPOCHS 1 -> 2 since update 7" in error


def test_export(tables, tmp_path):
    """What is exported holds no path of this machine and makes the same table again."""
    for seed, accuracy in enumerate((90.0, 92.0)):
        add_run(tmp_path, "first", f"a{seed}", [10.0, accuracy], "SEED", seed)
    status, output, _ = tables("tiny", "--export", "records")
    assert status == 0 and cells(output, "First")["top-1"] == "91.00 ± 1.41"
    exported = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "records").rglob("*") if path.is_file())
    assert exported == [f"records/first/seed{seed}/{name}" for seed in (0, 1)
                        for name in ("config.yaml", "metrics.jsonl", "run.yaml")]
    assert not [path for path in exported if "/private" in (tmp_path / path).read_text()]
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "records").rename(tmp_path / "runs")
    assert tables("tiny", "--export", "records") == (0, output, "")  # records can be exported again


def test_bad_input(tables, tmp_path):
    assert tables("tny")[::2] == (
        2, "paper_tables.py: there is no table tny; did you mean tiny?; there are tiny\n")
    assert "there is no folder nowhere; name the folders of your runs with --runs" in tables("--runs", "nowhere")[2]
    folder = add_run(tmp_path, "first", "damaged", [1.0, 2.0])
    (folder / "run.yaml").write_text("git_commit: abc\n")
    status, _, error = tables()
    assert status == 2 and error.startswith("paper_tables.py: runs/damaged holds a run that cannot be read (KeyError(")


@pytest.mark.parametrize(("name", "text"), [
    ("run.yaml", "[1]"), ("run.yaml", "{effective_batch: 1, git_commit: a, changes: [{keys: 3}]}"),
    ("run.yaml", "{effective_batch: 1, git_commit: 3}"), ("run.yaml", "a: &a [*a]"), ("config.yaml", "[1]"),
    ("eval.json", "[" * 100_000), ("eval.json", "[]"), ("eval.json", '{"eval": {"acc1": "high"}, "config": {}}'),
    ("metrics.jsonl", "[" * 100_000 + "\n"),
])
def test_what_is_no_run_s_file_is_one_line(name, text, tables, tmp_path):
    folder = add_run(tmp_path, "first", "odd", [1.0, 2.0])
    (folder / name).write_text(text)
    status, _, error = tables()
    assert status == 2 and error.startswith("paper_tables.py: runs/odd") and error.count("\n") == 1


def test_keys_that_do_not_matter_exist():
    assert paper_tables.FREE_KEYS <= flat_keys(load_config()).keys()


def test_paper_s_figures():
    """Those of the README's table."""
    tables = paper_tables.read_tables(ROOT / "tools" / "tables.yaml")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for variant in ("tiny_light", "tiny", "small", "base"):
        (line,) = [line for line in readme.splitlines() if line.startswith("| Strip-MLP") and f"`{variant}`" in line]
        figures = [cell.strip() for cell in line.strip("|").split("|")][4:]
        (imagenet, *small) = [
            next(row.paper for row in tables[data][1] if row.key == f"smlp_{variant}_alpha3_patch4_224_{data}")
            for data in ("imagenet1k", "cifar10", "cifar100", "caltech101")
        ]
        assert figures == [f"{imagenet['acc1']} / {imagenet['acc5']}", *(f"{paper['acc1']:.2f}" for paper in small)]
