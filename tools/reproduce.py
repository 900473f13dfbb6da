"""Launches every run of a table, one after another, and skips finished runs:

    python tools/reproduce.py cifar10 --data-path DIR                     # on a GPU if there is one, else the CPU
    python tools/reproduce.py cifar10 --seeds 3 --nproc 8 --data-path DIR # each run on 8 GPUs, three seeds of each
    python tools/reproduce.py cifar10 --slurm "--nodes 1 --gpus-per-node 8" --data-path DIR     # a SLURM job for each
    python tools/reproduce.py cifar10 --dry-run                           # only prints the commands

Rerun the same command to resume. A second one at the same time takes the runs that the first has not started. main.py's
training flags are passed to every run. Results are in OUTPUT/ROW/MODEL.NAME/seedN/, for tools/paper_tables.py;
tools/tables.yaml lists the tables.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checkpoint  # noqa: E402
from arguments import argument_parser, config_overrides, parse_arguments  # noqa: E402
from config import (
    load_config,  # noqa: E402
    read_yaml,  # noqa: E402
)
from resume import changed_keys  # noqa: E402
from tools.tables import ROOT, TABLES, choose, final_results, read_tables  # noqa: E402
from utils import (
    InputError,  # noqa: E402
    one_line_errors,  # noqa: E402
)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit status is 0, 1 after failed runs, 2 for bad input, 75 after a signal."""
    return launch(parse_arguments(launch_parser(), argv))


def launch_parser() -> argparse.ArgumentParser:
    """The launcher's arguments, and main.py's flags, which are passed to every run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        parents=[argument_parser(add_help=False)], conflict_handler="resolve",
    )
    parser.add_argument("table", help="a table of tools/tables.yaml")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="only these rows; default: all")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each row, with seeds 0 to N-1")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes per run, one per GPU")
    parser.add_argument("--slurm", metavar="OPTIONS", help="submit each run as a job with these options of sbatch")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    parser.add_argument("--tables", default=TABLES, metavar="FILE", help="default: tools/tables.yaml")
    parser.add_argument("--output", default="output", metavar="DIR", help="folder for the results; default: output")
    parser.add_argument("--cfg", help=argparse.SUPPRESS)  # which main.py requires
    return parser


def passed_on(args: argparse.Namespace) -> list[str]:
    """The flags of main.py among the arguments."""
    flags = []
    for action in argument_parser(add_help=False)._actions:
        value = getattr(args, action.dest)
        if action.dest not in ("output", "opts") and value != action.default:
            flags += [action.option_strings[0]] if action.nargs == 0 else [action.option_strings[0], str(value)]
    return flags


def launch(args: argparse.Namespace) -> int:
    """Runs everything that is not finished yet, all rows with the first seed first."""
    tables = read_tables(args.tables)
    _, rows = tables[choose([args.table], tables, "table")[0]]
    rows = {row.key: row for row in rows}
    for name in ("cfg", "tag"):
        if getattr(args, name):
            raise InputError(f"--{name} is set by this tool for each run; leave it out")
    for name in ("eval", "throughput", "resume"):
        if getattr(args, name):
            raise InputError(f"--{name} is for a single run; use it with main.py. This command only trains")
    flags = passed_on(args)
    if args.seeds < 1 or args.nproc < 1:
        raise InputError(f"--seeds {args.seeds} and --nproc {args.nproc} must be at least 1")
    if args.slurm is not None and Path.cwd() != ROOT:
        raise InputError(f"--slurm: run this in the repository's folder, {ROOT}")
    failed = 0
    for seed in range(args.seeds):
        for key in choose(args.rows, rows, "row"):
            name = f"{key}_seed{seed}"
            arguments = [
                "--cfg", os.path.relpath(rows[key].path), "--output", str(Path(args.output, key)),
                "--tag", f"seed{seed}", *flags, "--opts", *rows[key].opts, *args.opts, "SEED", str(seed),
            ]
            config = load_config(rows[key].path, config_overrides(parse_arguments(argument_parser(), arguments)))
            folder = Path(config.OUTPUT, config.MODEL.NAME, config.TAG)
            if not args.allow_changes:
                check_settings(folder, config)
            command = build_command(args, name, arguments)
            if final_results(folder, config.TRAIN.EPOCHS):
                print(f"{name}: finished, see {folder}", flush=True)
            elif args.dry_run:
                print(f"{name}: {shlex.join(command)}", flush=True)
            elif is_running(folder) or args.slurm is not None and is_queued(name):
                print(f"{name}: in progress elsewhere", flush=True)
            else:
                print(f"{name}: {shlex.join(command)}", flush=True)
                status, stopped = run(command)
                if stopped:
                    return 75
                if status == 2 and not is_running(folder):  # the other runs would fail too
                    raise InputError(f"{name} cannot run; its last line gives the reason")
                if status:
                    print(f"{name}: exit status {status}", file=sys.stderr, flush=True)
                    failed += 1
    return 1 if failed else 0


def check_settings(folder: Path, config) -> None:
    """Raises InputError if a folder holds a run that was started with other settings."""
    path = folder / "config.yaml"
    if path.is_file() and (checkpoint.list_checkpoints(folder) or (folder / "metrics.jsonl").is_file()):
        changes = ", ".join(f"{key} {change}" for key, change in changed_keys(read_yaml(path), config).items())
        if changes:
            raise InputError(f"{folder} holds a run with other settings: {changes}; choose another --output")


def build_command(args: argparse.Namespace, job: str, arguments: list[str]) -> list[str]:
    """The command of a run: main.py in this Python, under torchrun, or as a SLURM job."""
    if args.slurm is not None:
        return ["sbatch", "--job-name", job, *shlex.split(args.slurm), "tools/slurm_train.sh", *arguments]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.nproc}"] * (args.nproc > 1)
    return [sys.executable, *launcher, os.path.relpath(ROOT / "main.py"), *arguments]


def is_running(folder: Path) -> bool:
    """Whether another process is training in a folder."""
    if not folder.is_dir():
        return False
    try:
        checkpoint.lock_folder(folder).close()
    except InputError:
        return True
    return False


def is_queued(job: str) -> bool:
    """Whether SLURM has a job of this user with that name, running or waiting."""
    try:
        listing = subprocess.run(["squeue", "--me", "--noheader", "--format=%j"], stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise InputError("--slurm: there is no squeue here; run this on a machine that can submit jobs") from None
    return job in listing.stdout.split()


def run(command: list[str]) -> tuple[int, bool]:
    """The exit status of a command, and whether a signal arrived, which is passed on to the command."""
    process, signals = subprocess.Popen(command), []

    def pass_on(number, frame):
        signals.append(number)
        process.send_signal(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
    handlers = {number: signal.signal(number, pass_on) for number in numbers}
    status = process.wait()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return status, bool(signals)


if __name__ == "__main__":
    sys.exit(main())
