"""The tables of ``tables.yaml``, and the results of finished runs."""

import math
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
    """``{table: (title, rows)}`` of a file like ``tables.yaml``."""
    if not Path(path).is_file():
        raise MissingFileError(f"the file of tables {path} does not exist; see tools/tables.yaml")
    tables = {}
    try:
        for table, content in read_yaml(Path(path)).items():
            _check_keys(content, _TABLE_KEYS, f"{path}: {table}")
            rows = [_read_row(key, row, f"{path}: {table}: {key}") for key, row in content["rows"].items()]
            tables[table] = content["title"], rows
    except (AttributeError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not a file of tables like tools/tables.yaml: {error!r}") from None
    return tables


def _read_row(key: str, row: dict, where: str) -> Row:
    _check_keys(row, _ROW_KEYS, where)
    file, paper = f"{row.get('config', key)}.yaml", row.get("paper", [])
    return Row(
        key=key,
        name=row["name"],
        path=next((ROOT / "configs").rglob(file), ROOT / "configs" / file),
        opts=tuple(map(str, row.get("opts", []))),
        paper=dict(zip(("acc1", "acc5"), paper if isinstance(paper, list) else [paper], strict=False)),
    )


def _check_keys(values: dict, known: tuple[str, ...], where: str) -> None:
    for key in values.keys() - set(known):
        hint = "; it belongs into a row" if key in _ROW_KEYS else nearest(str(key), known)
        raise InputError(f"{where}: unknown key {key}{hint}; known are {', '.join(known)}")


def choose(names: list[str], known, what: str) -> list[str]:
    """``names``, or all of ``known`` if there are none; an InputError names one that is unknown."""
    for name in names:
        if name not in known:
            raise InputError(f"there is no {what} {name}{nearest(name, known)}; there are {', '.join(known)}")
    return list(names or known)


def final_results(folder: Path, epochs: int) -> list[dict]:
    """A finished run's evaluations, one per epoch, see ``better``; empty for an unfinished run."""
    path = folder / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() and path.stat().st_size else []
    by_epoch = {}
    for record in records:
        if record["kind"] in ("eval", "eval_ema"):
            by_epoch.setdefault(record["epoch"], []).append(record)
    return [better(*results) for results in by_epoch.values()] if epochs - 1 in by_epoch else []


def better(*results: dict) -> dict:
    """Of the network's result and that of its averaged weights, the one that the run itself counts: the higher top-1,
    and if equal the lower loss."""
    return max(results, key=lambda result: (result["acc1"], -(result.get("loss") or math.inf)))
