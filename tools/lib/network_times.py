"""Times of networks' training and inference steps, measured in turn: part ``networks`` of benchmark.py."""

import contextlib
import gc
import itertools
import statistics
import sys
from dataclasses import asdict, dataclass, field

import timm
import torch
from torch.utils.benchmark import Timer

from engine import CompiledNetwork, Precision
from models.strip_mlp import VARIANTS
from tools.lib.published import published_formulation

CLASSES = 1000


@dataclass
class Case:
    """One network in one setting, and its measurements."""

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


def speed_up(case: Case, baseline: Case) -> float:
    """The median over the repeats of the case's speed-up over the baseline in the same turn."""
    return statistics.median(b / c for b, c in zip(baseline.seconds, case.seconds, strict=True))


def groups_of_cases(args, device: torch.device) -> list[list[Case]]:
    """The cases of the command line; those of a group are measured in turn.

    Inference is measured before training: after training, a process already holds its memory, while one that only
    infers waits for pages from the system.
    """

    def group(names, mode, dtype, compiled) -> list[Case]:
        forms = {"inference": ["published", "ours", "fused"], "training": ["published", "ours"]}[mode]
        if compiled:
            forms = forms[1:]  # the published formulation is only run eagerly
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
        network = CompiledNetwork(network, may_fail=False)

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
    """The bytes that a network keeps between steps: weights, statistics, and in training AdamW's two moments."""
    weights, buffers = (sum(t.numel() * t.element_size() for t in tensors)
                        for tensors in (network.parameters(), network.buffers()))
    return buffers + weights * (3 if mode == "training" else 1)


def seconds_of(function, least: float = 0.0) -> float:
    """Seconds per call: the median of as many calls as take ``least`` seconds together, or the time of one call."""
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=least).median if least else timer.timeit(1).mean


def measure(cases: list[Case], args, device: torch.device) -> None:
    """Times the cases in turn, so that a temporary slowdown of the machine affects all of them."""
    steps = []
    for case in cases:
        with multiplication(case.dtype):
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
            with multiplication(case.dtype):
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
        except RuntimeError as error:  # mostly out of memory; the other groups are still measured
            failed.append(f"{label} ({str(error).splitlines()[0]})")
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return measured, failed


@contextlib.contextmanager
def multiplication(dtype: str):
    """TF32 for 32-bit products if that is measured, full precision otherwise."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value
