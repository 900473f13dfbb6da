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
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import arguments
from utils import InputError, one_line_errors

SINGLE = ("cfg", "tag", "eval", "throughput", "resume", "output")  # flags of main.py that are for a single run


def flags_of_runs() -> list[argparse.Action]:
    """The flags of main.py that are passed to every run."""
    return [action for action in arguments.argument_parser(add_help=False)._actions if action.dest not in SINGLE]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The launcher's arguments, and main.py's flags, which are passed to every run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("table", help="a table of tools/tables.yaml")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="only these rows; default: all")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each row, with seeds 0 to N-1")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes per run, one per GPU")
    parser.add_argument("--slurm", metavar="OPTIONS", help="submit each run as a job with these options of sbatch")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    parser.add_argument("--tables", default=Path(__file__).with_name("tables.yaml"), metavar="FILE",
                        help="default: tools/tables.yaml")
    parser.add_argument("--output", default="output", metavar="DIR", help="folder for the results; default: output")
    for action in flags_of_runs():
        parser._add_action(action)
    for word in sys.argv[1:] if argv is None else argv:
        flag = word.partition("=")[0]
        if flag != "--output" and flag.removeprefix("--") in SINGLE:
            parser.error(f"{flag} is for a single run, with main.py; this command sets config and tag, and only trains")
    return arguments.parse_arguments(parser, argv)


if __name__ == "__main__":
    parse_arguments()  # before the slow imports, so that --help is fast

import os
import shlex
import signal
import subprocess

import checkpoint
from arguments import argument_parser, config_overrides
from config import load_config, read_yaml
from resume import changed_keys
from tools.tables import ROOT, choose, final_results, read_tables


def passed_on(args: argparse.Namespace) -> list[str]:
    """The flags of main.py among the arguments."""
    flags = []
    for action in flags_of_runs():
        value = getattr(args, action.dest)
        if action.dest != "opts" and value != action.default:
            flags += [action.option_strings[0]] if action.nargs == 0 else [action.option_strings[0], str(value)]
    return flags


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 0, 1 after failed runs, 2 for bad input, 75 after a signal."""
    args = parse_arguments(argv)
    tables = read_tables(args.tables)
    _, rows = tables[choose([args.table], tables, "table")[0]]
    rows = {row.key: row for row in rows}
    flags = passed_on(args)
    if args.seeds < 1 or args.nproc < 1:
        raise InputError(f"--seeds {args.seeds} and --nproc {args.nproc} must be at least 1")
    if args.slurm is not None and Path.cwd() != ROOT:
        raise InputError(f"--slurm: run this in the repository's folder, {ROOT}")
    failed = 0
    for seed in range(args.seeds):
        for key in choose(args.rows, rows, "row"):
            name = f"{key}_seed{seed}"
            words = [
                "--cfg", os.path.relpath(rows[key].path), "--output", str(Path(args.output, key)),
                "--tag", f"seed{seed}", *flags, "--opts", *rows[key].opts, *args.opts, "SEED", str(seed),
            ]
            config = load_config(rows[key].path, config_overrides(argument_parser().parse_args(words)))
            folder = Path(config.OUTPUT, config.MODEL.NAME, config.TAG)
            if not args.allow_changes:
                check_settings(folder, config)
            command = build_command(args, name, words)
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


def build_command(args: argparse.Namespace, job: str, words: list[str]) -> list[str]:
    """The command of a run: main.py in this Python, under torchrun, or as a SLURM job."""
    if args.slurm is not None:
        return ["sbatch", "--job-name", job, *shlex.split(args.slurm), "tools/slurm_train.sh", *words]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.nproc}"] * (args.nproc > 1)
    return [sys.executable, *launcher, os.path.relpath(ROOT / "main.py"), *words]


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
