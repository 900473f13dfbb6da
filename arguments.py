"""The flags of the command line, and the config keys that they set."""

import argparse

from config import check_pairs, flat_keys, load_config, nearest

FLAG_KEYS = {  # flags that set a config key
    "batch_size": "DATA.BATCH_SIZE",
    "data_path": "DATA.DATA_PATH",
    "zip": "DATA.ZIP_MODE",
    "cache_mode": "DATA.CACHE_MODE",
    "pretrained": "MODEL.PRETRAINED",
    "resume": "MODEL.RESUME",
    "accumulation_steps": "TRAIN.ACCUMULATION_STEPS",
    "use_checkpoint": "TRAIN.USE_CHECKPOINT",
    "amp_dtype": "AMP_DTYPE",
    "compile": "COMPILE",
    "output": "OUTPUT",
    "tag": "TAG",
}


def argument_parser(description: str | None = None, add_help: bool = True) -> argparse.ArgumentParser:
    """The flags of ``main.py``, which ``tools/reproduce.py`` passes on to every run."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        add_help=add_help,
    )
    parser.add_argument("--cfg", required=True, metavar="FILE", help="the run's config, see configs/")
    parser.add_argument("--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE",
                        help="config keys to set, e.g. --opts TRAIN.EPOCHS 100 AUG.MIXUP 0; config.py lists them all")
    parser.add_argument("--data-path", metavar="DIR", help="the data set's folder")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images per process and micro-batch")
    parser.add_argument("--zip", action="store_true", default=None,
                        help="read train.zip and val.zip instead of folders")
    parser.add_argument("--cache-mode", metavar="MODE",
                        help="what --zip keeps in memory: no (nothing), part (each process its share), full")
    parser.add_argument("--pretrained", metavar="CKPT",
                        help="start from these weights: a file, an exported folder, or hf-hub:USER/NAME")
    parser.add_argument("--resume", metavar="CKPT",
                        help="resume from this checkpoint, or evaluate it (--eval); takes the same as --pretrained")
    parser.add_argument("--accumulation-steps", type=int, metavar="N", help="micro-batches per update")
    parser.add_argument("--use-checkpoint", action="store_true", default=None, help="gradient checkpointing")
    parser.add_argument("--amp-dtype", metavar="TYPE",
                        help="bf16, fp16, fp32 or auto (GPU: bf16, or fp16 if it has no bf16; CPU: fp32)")
    parser.add_argument("--compile", nargs="?", const="on", choices=["auto", "on", "off"],
                        help="torch.compile the network: on, off or auto (default: only for training on CUDA)")
    parser.add_argument("--device", default="", metavar="TYPE",
                        help="cpu, cuda, mps or another that PyTorch finds; default: cuda where there is a GPU")
    parser.add_argument("--output", metavar="DIR", help="results go to DIR/<model name>/<tag>/; default: output")
    parser.add_argument("--tag", metavar="NAME", help="name of the run")
    parser.add_argument("--allow-changes", action="store_true",
                        help="resume a run although its settings changed, and record the changes in its run.yaml")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--eval", action="store_true", help="evaluate --resume (default: the run's best checkpoint)")
    mode.add_argument("--throughput", action="store_true", help="measure images per second of the forward pass")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers set LOCAL_RANK
    parser.add_argument("--amp-opt-level", help=argparse.SUPPRESS)
    return parser


def parse_arguments(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; an unknown flag is an error that names the nearest known one."""
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        name = unknown[0].split("=")[0]
        parser.error(f"unknown argument {unknown[0]}{_as_option(name) or nearest(name, flags)}")
    return args


def _as_option(flag: str) -> str:
    """How to set the config keys that an unknown flag may mean, for a message: ``--epochs`` is ``TRAIN.EPOCHS``."""
    name = flag.lstrip("-").replace("-", "_").upper()
    known = flat_keys(load_config()) if flag.startswith("--") else ()
    keys = [key for key in known if key.split(".")[-1] == name] or [key for key in known if key.endswith(f"_{name}")]
    return f"; set {' or '.join(keys)} with --opts {keys[0]} VALUE" if keys else ""


def config_overrides(args: argparse.Namespace) -> list:
    """The config keys that the command line sets, as ``load_config`` takes them; flags win over ``--opts``."""
    check_pairs(args.opts)
    flags = [(key, getattr(args, flag)) for flag, key in FLAG_KEYS.items() if getattr(args, flag) is not None]
    return [*args.opts, *(item for pair in flags for item in pair)]
