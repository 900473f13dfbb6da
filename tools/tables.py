"""The tables of ``tables.yaml`` and the finished runs in folders, for reproduce.py and paper_tables.py."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from config import flat_keys, load_config, nearest, read_yaml
from plots import read_metrics
from utils import InputError, MissingFileError

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "tools" / "tables.yaml"
_TABLE_KEYS, _ROW_KEYS = ("title", "rows"), ("name", "config", "opts", "paper")


@dataclass(frozen=True)
class Row:
    """A network of a table."""

    key: str
    name: str
    path: Path  # of its config
    opts: tuple[str, ...]  # config keys and values set on top
    paper: dict[str, float]  # the paper's figures in percent, by acc1 and acc5

    def config(self):
        """The config of its runs."""
        return load_config(self.path, self.opts)

    @cached_property
    def recipe(self) -> dict:
        """The same config by dotted names."""
        return flat_keys(self.config())


def read_tables(path: str | Path = TABLES) -> dict[str, tuple[str, list[Row]]]:
    """``{table: (title, rows)}`` of a file like ``tables.yaml``.

    Raises:
        InputError: it is not such a file.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"the file of tables {path} does not exist; see tools/tables.yaml")
    tables = read_yaml(Path(path))
    try:
        for table, content in tables.items():
            _check_keys(content, _TABLE_KEYS, f"{path}: {table}")
            for key, row in content["rows"].items():
                _check_keys(row, _ROW_KEYS, f"{path}: {table}: {key}")
        return {
            table: (content["title"], [_read_row(key, row) for key, row in content["rows"].items()])
            for table, content in tables.items()
        }
    except (AttributeError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not a file of tables like tools/tables.yaml: {error!r}") from None


def _check_keys(values: dict, known: tuple[str, ...], where: str) -> None:
    for key in values.keys() - set(known):
        hint = "; it belongs into a row" if key in _ROW_KEYS else nearest(str(key), known)
        raise InputError(f"{where}: unknown key {key}{hint}; known are {', '.join(known)}")


def _read_row(key: str, row: dict) -> Row:
    paper = row.get("paper", [])
    return Row(
        key=key,
        name=row["name"],
        path=_find_config(row.get("config", key)),
        opts=tuple(map(str, row.get("opts", []))),
        paper=dict(zip(("acc1", "acc5"), paper if isinstance(paper, list) else [paper], strict=False)),
    )


def _find_config(name: str) -> Path:
    """The config file of that name, in any folder of configs/."""
    found = sorted((ROOT / "configs").rglob(f"{name}.yaml"))
    return found[0] if found else ROOT / "configs" / f"{name}.yaml"


def choose(names: list[str], known, what: str) -> list[str]:
    """``names``, or all of ``known`` if there are none.

    Raises:
        InputError: one of them is unknown.
    """
    for name in names:
        if name not in known:
            raise InputError(f"there is no {what} {name}{nearest(name, known)}; there are {', '.join(known)}")
    return list(names or known)


def final_results(folder: Path, epochs: int) -> list[dict]:
    """A finished run's evaluations, one per epoch, of the averaged weights if there are any; empty for an unfinished
    run.

    Raises:
        InputError: its ``metrics.jsonl`` is damaged.
    """
    path = folder / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() and path.stat().st_size else []
    results = [record for record in records if record["kind"] == "eval_ema"]
    results = results or [record for record in records if record["kind"] == "eval"]
    return results if results and results[-1]["epoch"] == epochs - 1 else []
