"""How fast Strip-MLP is: networks, the strip operator alone, and the input pipeline.

    python tools/benchmark.py                                        # all of it, on this machine's device
    python tools/benchmark.py --parts networks --models strip_mlp_tiny --modes training --dtypes bf16
    python tools/benchmark.py --device cpu --json docs/benchmarks/cpu.json

Networks are measured in one process, in turns: this project's Strip-MLP, its inference form, the published formulation
(``published.py``) and timm's peers of the same accuracy. What is printed is Markdown; the JSON file holds the time of
every turn.
"""

import argparse
import contextlib
import datetime
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import timm
import torch
from PIL import Image
from torch.utils.benchmark import Timer

import models  # noqa: F401  registers Strip-MLP with timm
from compiling import OPTIONS
from config import load_config
from data import build_train_loader
from engine import Precision
from models.strip_mlp import VARIANTS, StripMLP
from report import describe_environment
from tools.published import GroupedConvolution, published_formulation

PARTS = ["networks", "operator", "pipeline"]
PEERS = ["convnext_tiny", "swin_tiny_patch4_window7_224", "resnet50"]
CLASSES = 1000
STAGES = {"strip_mlp_tiny_light": (80, 2), "strip_mlp_base": (112, 4)}  # embed_dim, P of the operator's shapes


@dataclass
class Case:
    """One network in one setting, and what was measured of it."""

    model: str
    form: str  # ours | ours NCHW | fused | published | timm
    mode: str  # inference | training
    dtype: str  # fp32 | tf32 | bf16 | fp16
    compiled: bool
    batch_size: int
    seconds: list[float] = field(default_factory=list)  # of each repeat's step
    peak_bytes: int = 0  # of weights, optimiser and one step; 0 on the CPU

    @property
    def images_per_second(self) -> float:
        return self.batch_size / statistics.median(self.seconds)


def groups_of_cases(args, device: torch.device) -> list[list[Case]]:
    """What the command line asks for; the cases of a group are measured in turns.

    Inference comes before anything is trained: a process that has trained finds its memory at hand, one that only
    infers waits for the system's pages.
    """

    def group(names, mode, dtype, compiled) -> list[Case]:
        forms = {"inference": ["published", "ours", "fused"], "training": ["published", "ours"]}[mode]
        if compiled:
            forms = forms[1:]  # the published formulation is what is run eagerly
        elif device.type == "cuda" and dtype == "bf16":
            forms = [*forms, "ours NCHW"]
        return [
            Case(name, form, mode, dtype, compiled, args.batch_size)
            for name in names for form in (forms if name in VARIANTS else ["timm"])
        ]

    settings = itertools.product(args.modes, args.dtypes, [False, True] if args.compile else [False])
    groups = [
        group(names, *setting) for setting in settings for names in [*([name] for name in args.models), args.peers]
    ]
    return [cases for cases in groups if cases]


def build_step(case: Case, img_size: int, device: torch.device):
    """The network of the case, and a function that runs one step of it."""
    torch.manual_seed(0)
    sizes = {"img_size": img_size} if case.model in VARIANTS or "swin" in case.model else {}
    network = timm.create_model(case.model, num_classes=CLASSES, **sizes).to(device)
    layout = torch.contiguous_format if case.form in ("published", "ours NCHW") else torch.channels_last
    if case.form == "published":
        network = published_formulation(network)
    if case.form == "fused":
        network.fuse()
    network = network.to(memory_format=layout).train(case.mode == "training")
    images = torch.randn(case.batch_size, 3, img_size, img_size, device=device).contiguous(memory_format=layout)
    targets = torch.arange(case.batch_size, device=device) % CLASSES
    precision = Precision("fp32" if case.dtype == "tf32" else case.dtype, device)
    if case.compiled:
        network.compile(options=OPTIONS)

    if case.mode == "inference":
        @torch.inference_mode()
        def step():
            with precision.autocast():
                network(images)
    else:
        criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
        optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        scaler = precision.scaler()

        def step():
            with precision.autocast():
                loss = criterion(network(images), targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

    return network, step


def own_bytes(network: torch.nn.Module, mode: str) -> int:
    """What a network keeps between steps: weights, statistics, and in training AdamW's two moments of each weight."""
    weights, buffers = (sum(t.numel() * t.element_size() for t in tensors)
                        for tensors in (network.parameters(), network.buffers()))
    return buffers + weights * (3 if mode == "training" else 1)


def seconds_of(function, least: float = 0.0) -> float:
    """Seconds of one call: the median of as many as take ``least`` seconds together, or one call's."""
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=least).median if least else timer.timeit(1).mean


def measure(cases: list[Case], args, device: torch.device) -> None:
    """Times the cases in turns, so that what slows the machine for a while slows all of them."""
    steps = []
    for case in cases:
        with _multiplication(case.dtype):
            network, step = build_step(case, args.img_size, device)
            step()  # compiles, chooses algorithms, fills the optimiser
            step()
            if device.type == "cuda":
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                step()
                case.peak_bytes = torch.cuda.max_memory_allocated() - before + own_bytes(network, case.mode)
        steps.append(step)
    for _ in range(args.repeats):
        for case, step in zip(cases, steps, strict=True):
            with _multiplication(case.dtype):
                case.seconds.append(seconds_of(step, least=0.2 if device.type == "cuda" else 0.0))


def measure_groups(groups: list[list[Case]], args, device: torch.device) -> tuple[list[dict], list[str]]:
    """The measured cases, and the groups that failed and why."""
    measured, failed = [], []
    for cases in groups:
        label = f"{cases[0].mode} {cases[0].dtype}{' compiled' * cases[0].compiled} {cases[0].model}"
        print(label, file=sys.stderr, flush=True)
        try:
            measure(cases, args, device)
            measured += [asdict(case) for case in cases]
        except RuntimeError as error:  # out of memory, mostly; the other groups are worth having
            failed.append(f"{label} ({str(error).splitlines()[0]})")
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return measured, failed


@contextlib.contextmanager
def _multiplication(dtype: str):
    """TF32 for 32-bit products where that is what is measured, full precision elsewhere."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def measure_device(device: torch.device, dtype: torch.dtype) -> dict:
    """What the device reaches: bytes/s of a large copy (read and written), FLOP/s of a large matrix product."""
    size = 2**28 if device.type == "cuda" else 2**25
    source = torch.randn(size, device=device).to(dtype)
    target = torch.empty_like(source)
    copy = min(seconds_of(lambda: target.copy_(source), 0.2) for _ in range(5))
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = min(seconds_of(lambda: a @ b, 0.2) for _ in range(5))
    return {"bytes_per_second": 2 * source.nbytes / copy, "flops": 2 * side**3 / product}


def measure_operator(args, device: torch.device) -> list[dict]:
    """The strip layer alone on each stage's shape, forward, and forward and backward."""
    dtype = Precision.DTYPES.get(args.dtypes[0], torch.float32)
    forms = ["published", "matmul"] + ["triton"] * (device.type == "cuda")
    rows = []
    for (name, (dim, patches)), stage, axis in itertools.product(STAGES.items(), range(4), ("row", "column")):
        channels, side = dim // 2 * 2**stage, args.img_size // 4 // 2**stage
        shape = args.batch_size, 2 * channels, side, side
        # As the network has it: the first half of a channels-last map's channels, which the kernels get as a copy.
        half = torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last).chunk(2, dim=1)[0]
        layers = {form: StripMLP(channels, side, patches, axis).to(device, dtype) for form in forms}
        inputs = {form: (half if form == "matmul" else half.contiguous()).detach().requires_grad_() for form in forms}
        for form, layer in layers.items():
            if form == "published":
                layer.__class__ = GroupedConvolution
            layer.form = form
        times = {(form, part): [] for form in forms for part in ("forward", "both")}
        for form, layer in layers.items():
            _forward_backward(layer, inputs[form])  # chooses algorithms, compiles kernels
        for _ in range(args.repeats):
            for form, layer in layers.items():
                with torch.no_grad():
                    times[form, "forward"].append(seconds_of(partial(layer, inputs[form]), 0.02))
                times[form, "both"].append(seconds_of(partial(_forward_backward, layer, inputs[form]), 0.02))
        for form in forms:
            forward, both = (statistics.median(times[form, part]) for part in ("forward", "both"))
            rows.append({
                "shapes_of": name, "stage": stage + 1, "axis": axis, "shape": list(half.shape), "form": form,
                "forward_seconds": forward, "forward_backward_seconds": both,
                "bytes_per_second": 2 * half.nbytes / forward,  # the input once and the output once
                "flops": 2 * half.numel() * 3 * side / forward,
            })
    return rows


def _forward_backward(layer, x) -> None:
    y = layer(x)
    y.backward(y)  # any gradient in the layout of the result


def measure_pipeline(args, device: torch.device) -> dict:
    """Images per second and worker of the ImageNet recipe's augmentation, and the share of a step spent waiting."""
    name = args.models[0]
    workers = min(os.cpu_count(), 16)
    ahead = 2 * workers  # batches that the workers prepare ahead
    with tempfile.TemporaryDirectory() as folder:
        _write_jpegs(Path(folder), count=max(64, 3 * ahead * args.batch_size))
        config = load_config("", [
            "DATA.DATASET", "imagefolder", "DATA.DATA_PATH", folder, "MODEL.NUM_CLASSES", "2", "MODEL.NAME", name,
            "DATA.IMG_SIZE", str(args.img_size), "DATA.BATCH_SIZE", str(args.batch_size), "DATA.NUM_WORKERS", "0",
        ])
        loader = build_train_loader(config)
        batches = iter(loader)
        next(batches)
        per_worker = args.batch_size / statistics.median(seconds_of(lambda: next(batches)) for _ in range(3))
        config = config.clone()
        config.defrost()
        config.DATA.NUM_WORKERS = workers
        _, step = build_step(Case(name, "ours", "training", args.dtypes[0], False, args.batch_size), args.img_size,
                             device)
        step()
        prepared = iter(build_train_loader(config))
        for i in range(2 * ahead):  # the third part keeps the workers busy until the end
            if i == ahead:  # what was prepared before the first step is used up
                start, waited = time.perf_counter(), 0.0
            before = time.perf_counter()
            next(prepared)
            if i >= ahead:
                waited += time.perf_counter() - before
            step()
            _synchronize(device)
        total = time.perf_counter() - start
        del prepared  # ends the workers before their images go
    return {"images_per_second_and_worker": per_worker, "workers": workers, "model": name,
            "share_of_step_waiting": waited / total, "images_per_second": ahead * args.batch_size / total}


def _write_jpegs(folder: Path, count: int) -> None:
    """Images of ImageNet's usual size: 500x375 pixels, about 100 KB, smooth with some noise; 64 different ones."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / "train" / str(i % 2) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i >= 64:
            os.link(folder / "train" / str(i % 2) / f"{i % 64}.jpg", path)
            continue
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        pixels = np.asarray(coarse, dtype=np.int16) + rng.integers(-20, 21, (375, 500, 3), dtype=np.int16)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def report(result: dict) -> str:
    """The measurements as Markdown tables."""
    environment, settings = result["environment"], result["settings"]
    lines = [
        f"{environment['device']}; PyTorch {environment['torch']}, timm {environment['timm']}, Python "
        f"{environment['python']}; commit {environment['git_commit']}; {result['date']}; {settings['threads']} CPU "
        f"threads; batch {settings['batch_size']} at {settings['img_size']}x{settings['img_size']}; median of "
        f"{settings['repeats']} repeats, in brackets the spread (largest less smallest, in percent of the median).",
    ]
    for mode in ("training", "inference"):
        rows = [Case(**case) for case in result["cases"] if case["mode"] == mode]
        if rows:
            lines += ["", f"**{mode.capitalize()}**", "", "| network | form | precision | images/s | vs published | "
                      "peak memory |", "|---|---|---|---|---|---|"]
        for case in rows:
            baseline = [other for other in rows if (other.model, other.dtype, other.form, other.compiled) == (
                case.model, case.dtype, "published", False)]
            ratio = f"{speed_up(case, baseline[0]):.2f}" if baseline else ""
            spread = 100 * (max(case.seconds) - min(case.seconds)) / statistics.median(case.seconds)
            memory = f"{case.peak_bytes / 2**30:.2f} GiB" if case.peak_bytes else ""
            lines.append(f"| {case.model} | {case.form}{', compiled' * case.compiled} | {case.dtype} | "
                         f"{case.images_per_second:.1f} ({spread:.0f} %) | {ratio} | {memory} |")
    if result["operator"]:
        copy, flops = result["device"]["bytes_per_second"], result["device"]["flops"]
        lines += ["", f"**The strip operator alone**, {settings['dtypes'][0]}. This device copies {copy / 1e9:.1f} GB/s"
                  f" and multiplies {flops / 1e12:.3f} TFLOP/s in the same run.", "",
                  "| stage (N, C, H, W) | axis | form | forward | forward + backward | GB/s, of copy | TFLOP/s |",
                  "|---|---|---|---|---|---|---|"]
        for row in result["operator"]:
            lines.append(f"| {row['stage']} {tuple(row['shape'])} | {row['axis']} | {row['form']} | "
                         f"{1e3 * row['forward_seconds']:.3f} ms | {1e3 * row['forward_backward_seconds']:.3f} ms | "
                         f"{row['bytes_per_second'] / 1e9:.1f}, {100 * row['bytes_per_second'] / copy:.0f} % | "
                         f"{row['flops'] / 1e12:.3f} |")
    if result["pipeline"]:
        pipeline = result["pipeline"]
        lines += ["", f"**Input pipeline**: {pipeline['images_per_second_and_worker']:.1f} images/s and worker (JPEG "
                  f"500x375, ImageNet's augmentation). Training {pipeline['model']} with {pipeline['workers']} workers "
                  f"waits for data {100 * pipeline['share_of_step_waiting']:.0f} % of the time "
                  f"({pipeline['images_per_second']:.1f} images/s)."]
    if result["failed"]:
        lines += ["", "Failed: " + "; ".join(result["failed"]) + "."]
    return "\n".join(lines)


def speed_up(case: Case, baseline: Case) -> float:
    """The median over the repeats of how many times faster the case was than the baseline in the same turn."""
    return statistics.median(b / c for b, c in zip(baseline.seconds, case.seconds, strict=True))


def main(argv: list[str] | None = None) -> int:
    """Measures, prints Markdown, writes JSON."""
    args = parse_arguments(argv)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    result = {
        "environment": describe_environment(device),
        "date": datetime.date.today().isoformat(),
        "command": "python tools/benchmark.py " + " ".join(sys.argv[1:] if argv is None else argv),
        "settings": {"batch_size": args.batch_size, "img_size": args.img_size, "repeats": args.repeats,
                     "dtypes": args.dtypes, "threads": torch.get_num_threads()},
    }
    result |= {"cases": [], "failed": [], "operator": [], "pipeline": None}
    if "networks" in args.parts:
        result["cases"], result["failed"] = measure_groups(groups_of_cases(args, device), args, device)
    with _multiplication(args.dtypes[0]):
        if "operator" in args.parts:
            result["device"] = measure_device(device, Precision.DTYPES.get(args.dtypes[0], torch.float32))
            result["operator"] = measure_operator(args, device)
        if "pipeline" in args.parts:
            result["pipeline"] = measure_pipeline(args, device)
    Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print(f"# `{result['command'].strip()}`\n\n{report(result)}")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; what is not given depends on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda where there is a GPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all three")
    parser.add_argument("--modes", nargs="+", choices=["inference", "training"], default=["inference", "training"],
                        help="of the networks; default: both")
    parser.add_argument("--models", nargs="+", choices=list(VARIANTS), metavar="NAME",
                        help="variants to measure; default: tiny_light, tiny and base on a GPU, without tiny on a CPU")
    parser.add_argument("--peers", nargs="*", default=PEERS, metavar="NAME", help="timm models to measure beside them")
    parser.add_argument("--dtypes", nargs="+", choices=["bf16", "fp16", "tf32", "fp32"],
                        help="precisions; the first is also the operator's; default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="measure compiled networks too; default: on a GPU only, since it takes minutes on a CPU")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images; default: 128 on a GPU, 8 on a CPU")
    parser.add_argument("--img-size", type=int, default=224, metavar="S", help="side of the images; default: 224")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns; default: 5")
    parser.add_argument("--json", default="output/benchmark.json", metavar="FILE", help="where every time goes")
    args = parser.parse_args(argv)
    on_gpu = args.device == "cuda"
    args.models = args.models or (
        ["strip_mlp_tiny_light", *["strip_mlp_tiny"] * on_gpu, "strip_mlp_base"])
    args.dtypes = args.dtypes or (["bf16"] if on_gpu else ["fp32"])
    args.compile = on_gpu if args.compile is None else args.compile
    args.batch_size = args.batch_size or (128 if on_gpu else 8)
    return args


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
