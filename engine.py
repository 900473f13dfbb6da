"""The loops: one epoch of training, evaluation, throughput; the precision and torch.compile."""

import contextlib
import datetime
import importlib.util
import logging
import os
import sys
import time

import torch
import torch._functorch.config
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import distributed
from data import DeviceBatches
from models import set_train_mode
from optimizer import skips_on_device
from resume import TrainState
from utils import InputError, error_message

logger = logging.getLogger("strip_mlp")

# By default Inductor writes normalised activations to memory if two kernels read them; computing them twice moves fewer
# bytes. Its layout optimisation keeps activations channels last, but only in forward passes unless it is forced, and
# PyTorch 2.12 and later then copy the activations of depthwise convolutions. Combined kernels are independent ones that
# share a launch. tools/bench/roofline.py counts what the options save.
OPTIONS = {
    "realize_opcount_threshold": 300,
    "realize_reads_threshold": 20,
    "realize_acc_reads_threshold": 40,
    "force_layout_optimization": True,
    "combo_kernels": torch.__version__ >= (2, 11),  # as far back as it was tried
}
_EARLY = "force_non_lazy_backward_lowering"  # PyTorch 2.11 has it, 2.8 does not
EARLY = {_EARLY: True} if hasattr(torch._functorch.config, _EARLY) else {}


# ---- precision and determinism ---------------------------------------------------------------------

class Precision:
    """The precision of the forward pass: autocast to bf16 or fp16, or fp32; ``auto`` depends on the hardware."""

    DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

    def __init__(self, name: str, device: torch.device):
        self.reason = "set by AMP_DTYPE"
        if name == "auto":
            name, self.reason = choose_precision(device)
        self.name, self.device_type, self.dtype = name, device.type, self.DTYPES[name]

    def autocast(self):
        """The context of a forward pass and its loss."""
        return torch.autocast(self.device_type, self.dtype, enabled=self.name != "fp32")

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling, which only fp16's narrow range needs; disabled otherwise."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def choose_precision(device: torch.device) -> tuple[str, str]:
    """``"bf16"``, ``"fp16"`` or ``"fp32"`` for the forward pass, and why."""
    if device.type == "cpu":
        return "fp32", "lower precision is not faster on a CPU"
    if device.type != "cuda":
        return "fp32", f"16-bit precision has not been tested on {device.type}"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if torch.version.hip or capability >= (8, 0):
        return "bf16", f"{name} supports it"
    version = ".".join(map(str, capability))
    if capability >= (7, 0):
        return "fp16", f"{name}, compute capability {version}, has no bf16; gradients are scaled"
    return "fp32", f"{name}, compute capability {version}, has no tensor cores"


def make_deterministic() -> None:
    """Makes every operation bitwise reproducible; one that cannot be raises RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when CUDA starts
    torch.use_deterministic_algorithms(True)


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The network on a device, with the weights of its convolutions channels last, as its activations are."""
    model.to(device)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return model


# ---- training --------------------------------------------------------------------------------------

def train_one_epoch(config, state, model: nn.Module, loader: DeviceBatches, precision, metrics, checkpointer):
    """Trains the rest of the epoch that ``state``, a TrainState, is in, and updates it.

    ``model`` is ``state.model``, compiled and wrapped in DistributedDataParallel as the run needs it; ``metrics`` a
    MetricsWriter on rank 0, None elsewhere. FloatingPointError: TRAIN.MAX_SKIPPED updates in a row were skipped.
    """
    set_train_mode(model)
    loader.batch_sampler.set_epoch(state.epoch, start_batch=state.batch)
    # Mixup makes soft targets and smooths them itself; without it the targets are class indices.
    criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if loader.mixup else config.MODEL.LABEL_SMOOTHING)
    updater = _Updater(config, state)
    accumulation = config.TRAIN.ACCUMULATION_STEPS
    progress = _Progress(config, state, loader, updater.device, metrics)

    for images, targets in progress.watch(loader):
        # 1. Forward and backward. The gradients of an update's micro-batches add up and are all-reduced with the last;
        # the last update of an epoch may have fewer of them.
        micro_batches = min(accumulation, len(loader) - state.batch // accumulation * accumulation)
        state.batch += 1
        is_last = state.batch % accumulation == 0 or state.batch == len(loader)
        is_distributed = isinstance(model, DistributedDataParallel)
        with contextlib.nullcontext() if is_last or not is_distributed else model.no_sync():
            with precision.autocast():
                loss = criterion(model(images), targets)
            updater.backward(loss / micro_batches)
        progress.add_loss(loss.detach(), len(targets))
        progress.report_bad_images(loader.bad_images())
        if not is_last:
            continue

        # 2. The update.
        lr = state.lr_scheduler.lr
        grad_norm, skipped = updater.update()
        state.step += 1
        state.lr_scheduler.step_update(state.step)

        # 3. Log and checkpoint. Only here does the CPU wait for the device. A log interval ends with each checkpoint,
        #    so that a resumed run logs the same intervals.
        is_due = checkpointer.is_due(state)
        progress.log(grad_norm, skipped, lr, now=is_due)
        if is_due:
            checkpointer.save(state)


def build_ema(config, model: nn.Module) -> ModelEmaV3 | None:
    """The exponential moving average of the weights, if TRAIN.EMA is enabled.

    Its decay rises to TRAIN.EMA.DECAY, as ``1 - (1 + updates) ** (-2 / 3)``: a short run would otherwise average its
    random initial weights.
    """
    return ModelEmaV3(model, decay=config.TRAIN.EMA.DECAY, use_warmup=True) if config.TRAIN.EMA.ENABLED else None


class _Updater:
    """Turns gradients into an update: unscale, clip, step, average.

    An update whose loss or gradient is not finite is skipped by all processes, since they all see the same gradient. It
    leaves weights, optimiser and running statistics unchanged; only the schedule and the average of the weights
    advance. The decision stays on the device.
    """

    def __init__(self, config, state: TrainState):
        self.state = state
        self.parameters = [p for p in state.model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.max_norm = config.TRAIN.CLIP_GRAD or float("inf")
        norms = [m for m in state.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        self.statistics = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
        self.good_statistics = torch.cat(self.statistics) if self.statistics else None

    def backward(self, loss: torch.Tensor) -> None:
        poison = loss.detach() * 0 + 1  # 1, or nan for a loss that is not finite, whose gradient might be
        self.state.scaler.scale(loss * poison).backward()

    def update(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient's norm before clipping, and whether the update was skipped; both stay on the device."""
        state = self.state
        state.scaler.unscale_(state.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        skipped = ~grad_norm.isfinite()
        if skips_on_device(state.optimizer):
            state.optimizer.found_inf = skipped.float()  # fp16's scaler replaces it with its own
            state.scaler.step(state.optimizer)
        elif not skipped:  # this waits for the device
            state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if self.statistics:
            self._average_statistics(skipped)
        if state.ema:
            state.ema.update(state.model, step=state.step)
        return grad_norm, skipped

    @torch.no_grad()
    def _average_statistics(self, skipped: torch.Tensor) -> None:
        """Sets the running statistics to their mean over all processes, so that these hold the same network, or back to
        their values before a skipped update."""
        statistics = distributed.all_reduce_sum(torch.cat(self.statistics)) / distributed.world_size()
        self.good_statistics = torch.where(skipped, self.good_statistics, statistics)
        torch._foreach_copy_(self.statistics, self.good_statistics.split([len(b) for b in self.statistics]))


class _Progress:
    """Log lines, metrics and the progress bar of an epoch; keeps the running sums on the device."""

    def __init__(self, config, state, loader, device, metrics):
        self.config, self.state, self.device, self.metrics = config, state, device, metrics
        self.batches = len(loader)
        self.updates_left = config.TRAIN.EPOCHS * -(-self.batches // config.TRAIN.ACCUMULATION_STEPS) - state.step
        self.bad_images = 0
        self._restart()

    def watch(self, loader):
        """The loader's batches; the time spent waiting for them is counted as data time."""
        bar = tqdm(total=self.batches, initial=self.state.batch, desc=f"epoch {self.state.epoch}", leave=False,
                   disable=not _shows_progress())
        batches = iter(loader)
        with bar:
            while True:
                start = time.perf_counter()
                batch = next(batches, None)
                self.data_seconds += time.perf_counter() - start
                if batch is None:
                    return
                yield batch
                bar.update()

    def add_loss(self, loss: torch.Tensor, images: int) -> None:
        self.loss_sum += loss * images
        self.images += images

    def report_bad_images(self, messages: list[str]) -> None:
        self.bad_images += len(messages)
        for message in messages:
            logger.error("%s; replaced by the next image (%s so far in this epoch)", message, self.bad_images)

    def log(self, grad_norm: torch.Tensor, skipped: torch.Tensor, lr: float, now: bool) -> None:
        self.updates += 1
        self.updates_left -= 1
        self.skipped += skipped
        state = self.state
        state.skipped_in_row = (state.skipped_in_row + 1) * skipped
        self.longest_row = self.longest_row.maximum(state.skipped_in_row)
        if state.step % self.config.PRINT_FREQ and state.batch < self.batches and not now:
            return
        sums = torch.tensor([float(self.loss_sum), self.images], dtype=torch.float64)
        loss_sum, images = distributed.all_reduce_sum(sums).tolist()
        skipped, longest_row, grad_norm = int(self.skipped), int(self.longest_row), float(grad_norm)
        seconds = (time.perf_counter() - self.start) / self.updates
        data_seconds = self.data_seconds / self.updates
        loss, speed = loss_sum / images, images / self.updates / seconds
        eta = datetime.timedelta(seconds=round(seconds * self.updates_left))
        memory = f"  mem {torch.cuda.max_memory_allocated() / 2**20:.0f}MB" if self.device.type == "cuda" else ""
        logger.info(
            f"Train: [{state.epoch}/{self.config.TRAIN.EPOCHS}][{state.batch}/{self.batches}]  eta {eta}  lr {lr:.6f}  "
            f"time {seconds:.4f}  data {data_seconds:.4f}  loss {loss:.4f}  grad_norm {grad_norm:.4f}{memory}"
        )
        if skipped:
            logger.warning(f"{skipped} of the last {self.updates} updates were skipped: loss or gradient not finite")
        if self.metrics:
            self.metrics.write("train", state.step, state.epoch, state.epoch + state.batch / self.batches, loss=loss,
                               lr=lr, grad_norm=grad_norm, skipped=skipped, images_per_second=speed,
                               data_share=data_seconds / seconds)
        if longest_row >= self.config.TRAIN.MAX_SKIPPED:
            raise FloatingPointError(
                f"{longest_row} updates in a row were skipped because the loss or gradient was not finite (the limit "
                "is TRAIN.MAX_SKIPPED). The last checkpoint is not affected. Try a lower TRAIN.BASE_LR, a longer "
                "TRAIN.WARMUP_EPOCHS, or --amp-dtype bf16 or fp32, and look for bad images"
            )
        self._restart()

    def _restart(self) -> None:
        self.start, self.data_seconds = time.perf_counter(), 0.0
        self.loss_sum, self.images, self.updates = torch.zeros((), device=self.device), 0, 0
        self.skipped, self.longest_row = torch.zeros(2, dtype=torch.int64, device=self.device)


# ---- evaluation ------------------------------------------------------------------------------------

@torch.no_grad()  # in inference mode autocast would cast the weights in every batch
def evaluate(model: nn.Module, loader: DeviceBatches, precision: Precision, predictions: list | None = None) -> dict:
    """Top-1 and top-5 accuracy (percent) and mean cross entropy over all images of a validation set.

    Every process evaluates its own share of the images; one all-reduce at the end adds up the sums. If one cannot read
    an image, all raise InputError. ``(target, prediction, probability)`` of each image of the share is added to the
    list ``predictions``.

    Returns:
        ``{"acc1", "acc5", "loss", "images"}``. The loss has 6 decimals; another batch size changes it by at most 1e-6.
        With fewer than five classes ``acc5`` counts all of them.
    """
    model.eval()
    device = next(model.parameters()).device
    hits1 = hits5 = torch.zeros((), dtype=torch.int64, device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    losses = [torch.zeros(0, device=device)]  # of every image; the CPU sums them in 64 bits, which MPS does not support
    failure, full_batch = "", 0
    try:
        with precision.autocast():  # around all batches, so that the weights are cast once
            for images, targets in tqdm(loader, desc="evaluate", leave=False, disable=not _shows_progress()):
                full_batch = max(full_batch, len(images))
                # A compiled network would be compiled once more for a short last batch.
                with torch.compiler.set_stance("force_eager" if len(images) < full_batch else "default"):
                    logits = model(images)
                losses.append(F.cross_entropy(logits.float(), targets, reduction="none"))
                count = count + (targets >= 0).sum()  # without the images that could not be read
                hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
                hits1 = hits1 + hits[:, 0].sum()
                hits5 = hits5 + hits.sum()
                if predictions is not None:
                    probabilities, classes = logits.float().softmax(dim=1).max(dim=1)
                    predictions += zip(targets.tolist(), classes.tolist(), probabilities.tolist(), strict=True)
    except InputError as error:  # an unreadable image; all processes stop together and can save the training
        failure = error_message(error)
    if failures := list(filter(None, distributed.gather_objects(failure))):
        raise InputError(failures[0])
    for message in loader.bad_images():
        logger.error("%s; skipped", message)
    losses = torch.cat(losses).cpu().double()
    sums = torch.tensor([hits1, hits5, losses.sum(), count, len(losses)], dtype=torch.float64)
    hits1, hits5, loss, count, seen = distributed.all_reduce_sum(sums).tolist()
    if seen != len(loader.dataset):
        raise RuntimeError(f"{seen:.0f} images were evaluated, but the validation set has {len(loader.dataset)}")
    if not count:
        raise InputError("no validation image can be read")
    return {"acc1": 100 * hits1 / count, "acc5": 100 * hits5 / count, "loss": round(loss / count, 6),
            "images": int(count)}


def evaluate_all(
    networks: dict[str, nn.Module], loader, precision: Precision, predictions: dict[str, list] | None = None
) -> dict[str, dict]:
    """The results of each network by its name; ``predictions`` has a list for those whose predictions are wanted."""
    wanted = predictions or {}
    return {name: evaluate(network, loader, precision, wanted.get(name)) for name, network in networks.items()}


def log_results(results: dict, before: str = "", after: str = "") -> None:
    """A log line for each network evaluated."""
    for name, result in results.items():
        logger.info(f"{name}: {before}top-1 {result['acc1']:.3f}  top-5 {result['acc5']:.3f}  "
                    f"loss {result['loss']:.4f}  ({result['images']} images){after}")


@torch.no_grad()
def measure_throughput(model: nn.Module, images: torch.Tensor, precision: Precision, repeats: int = 30) -> float:
    """Images per second of the forward pass, measured on one batch (N, C, H, W) repeatedly, after a warm-up."""
    model.eval()

    def seconds(runs: int) -> float:
        _synchronize(images.device)
        start = time.perf_counter()
        with precision.autocast():
            for _ in range(runs):
                model(images)
        _synchronize(images.device)
        return time.perf_counter() - start

    seconds(max(repeats // 3, 1))
    return repeats * len(images) / seconds(repeats)


def _shows_progress() -> bool:
    return distributed.rank() == 0 and sys.stderr.isatty()


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# ---- torch.compile ---------------------------------------------------------------------------------

def compile_network(model: nn.Module, setting: str, device: torch.device, deterministic: bool = False) -> nn.Module:
    """The network for the training loop: compiled at its first batch, or ``model`` itself.

    ``model`` itself is not changed: evaluation and checkpoints use it.

    Args:
        setting: COMPILE of the config. ``"auto"``: on CUDA GPUs of compute capability 7.0 or later with Triton, unless
            ``deterministic``, and if PyTorch compiles the backward pass with the forward pass (2.11 does, 2.8 does
            not); if the compiler fails, training continues without it. ``"on"``: such a failure is an error.
    """
    if setting == "off" or setting == "auto" and (deterministic or not _can_compile(device)):
        return model
    problem = ""
    if getattr(model, "grad_checkpointing", False) and torch.__version__ < (2, 11):
        problem = f"PyTorch {torch.__version__} counts BatchNorm's batches twice in a compiled, checkpointed network"
        if setting == "on":
            raise InputError(f"{problem}; use --compile off, or leave out --use-checkpoint")
    elif setting == "auto" and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        problem = "SyncBatchNorm (TRAIN.SYNC_BN) would split it into a graph for each norm"
    elif setting == "auto" and not EARLY:
        problem = (f"if the backward pass fails to compile, PyTorch {torch.__version__} cannot fall back; --compile on "
                   "compiles the network all the same")
    if problem:
        logger.info(f"not compiling the network: {problem}")
        return model
    logger.info(f"compiling the network at the first batch, which takes minutes the first time (COMPILE {setting})")
    return CompiledNetwork(model, may_fail=setting == "auto")


def _can_compile(device: torch.device) -> bool:
    is_recent = device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) >= (7, 0))
    return is_recent and importlib.util.find_spec("triton") is not None  # compiled code is written in it


class CompiledNetwork(nn.Module):
    """A network whose forward and backward passes are compiled, or the network itself if that fails."""

    def __init__(self, network: nn.Module, may_fail: bool):
        super().__init__()
        self.network = network
        self.may_fail = may_fail
        self.run = torch.compile(network.forward, options=OPTIONS)

    def forward(self, x):
        """(N, C, H, W) -> (N, num_classes)"""
        try:
            # The backward pass is compiled with the forward pass, so that a failure comes before anything has run.
            with torch._functorch.config.patch(EARLY):
                return self.run(x)
        except TorchDynamoException as error:
            if not self.may_fail:
                raise
            reason = next(iter(str(error).splitlines()), "")
            logger.warning(f"THE NETWORK COULD NOT BE COMPILED ({type(error).__name__}: {reason}); training continues "
                           "without torch.compile, more slowly. Use --compile off to skip compiling, or --compile on "
                           "to see the whole error")
            self.run = self.network
            return self.run(x)
