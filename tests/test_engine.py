""""""

import logging
import os

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import main
from config import load_config
from data import build_mixup, build_val_loader
from engine import CompiledNetwork, Precision, compile_network, evaluate, measure_throughput
from lr_scheduler import LRScheduler
from models import build_model
from optimizer import build_optimizer
from resume import Layout, TrainState
from tests.helpers import DIGITS, FAULTS, TINY, arguments, folder
from tests.processes import run, torchrun
from utils import InputError

CPU = torch.device("cpu")


class Batches:
    """A loader of fixed batches, mixed as they are handed over."""

    def __init__(self, batches, mixup=None):
        self.batches, self.batch_sampler, self.dataset, self.mixup = batches, self, self, mixup

    def bad_images(self):
        return []

    def set_epoch(self, epoch, start_batch):
        self.start_batch = start_batch

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for images, targets in self.batches[self.start_batch:]:
            images = images.contiguous(memory_format=torch.channels_last)
            yield self.mixup(images, targets) if self.mixup else (images, targets)


class NeverDue:
    def is_due(self, state):
        return False


def make_state(config, precision, updates_per_epoch=2, images=64, device=CPU):
    torch.manual_seed(0)
    model = build_model(config).to(device)
    optimizer = build_optimizer(config, model)
    layout = Layout("digits", images, 10, config.SEED, False, 16, 1, 1, "worker")
    return TrainState(layout, model, optimizer, LRScheduler(config, optimizer, updates_per_epoch),
                      precision.scaler(), None)


def batches(count, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 3, 16, 16, generator=generator), torch.randint(10, (size,), generator=generator))
            for _ in range(count)]


def train(config, data, state=None, precision=None, mixup=None):
    precision = precision or Precision(config.AMP_DTYPE, CPU)
    state = state or make_state(config, precision)
    engine.train_one_epoch(config, state, state.model, Batches(data, mixup), precision, None, NeverDue())
    return state


def tiny(*opts):
    return load_config(DIGITS, [*TINY, "MODEL.DROP_PATH_RATE", 0.0, "TRAIN.EMA.ENABLED", False, *opts])


def weights(state):
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


# ---- training --------------------------------------------------------------------------------------

def test_one_update_is_the_textbook_update():
    """Loss, clipping, AdamW and schedule of one update against plain PyTorch."""
    config = tiny("TRAIN.CLIP_GRAD", 0.1)
    data = batches(1)
    state = train(config, data)
    torch.manual_seed(0)
    model = build_model(config)
    decay = [p for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith("bias")]
    no_decay = [p for n, p in model.named_parameters() if p.ndim <= 1 or n.endswith("bias")]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": no_decay, "weight_decay": 0.0}],
                                  lr=config.TRAIN.WARMUP_LR, weight_decay=0.05)
    images, targets = data[0][0].contiguous(memory_format=torch.channels_last), data[0][1]
    nn.functional.cross_entropy(model(images), targets, label_smoothing=0.1).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert norm > 0.1
    for p in model.parameters():
        p.grad *= 0.1 / norm
    optimizer.step()
    torch.testing.assert_close(weights(state), torch.cat([p.detach().flatten() for p in model.parameters()]),
                               rtol=1e-6, atol=1e-8)
    assert (state.step, state.epoch, state.batch) == (1, 0, 1)


def frozen_statistics(config):
    """BatchNorm on stored statistics, so that micro-batches do not influence each other."""
    state = make_state(config, Precision("fp32", CPU))
    state.model.eval()
    state.model.train = lambda mode=True: state.model
    return state


def test_accumulated_micro_batches_equal_one_batch():
    data = batches(4)
    joined = [(torch.cat([data[i][0], data[i + 1][0]]), torch.cat([data[i][1], data[i + 1][1]])) for i in (0, 2)]
    sgd = ("TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.BASE_LR", 0.1)
    config = tiny("TRAIN.ACCUMULATION_STEPS", 2, *sgd)
    accumulated = train(config, data, frozen_statistics(config))
    config = tiny("TRAIN.ACCUMULATION_STEPS", 1, *sgd)
    whole = train(config, joined, frozen_statistics(config))
    assert accumulated.step == whole.step == 2
    torch.testing.assert_close(weights(accumulated), weights(whole), rtol=1e-5, atol=1e-6)


def test_tail_of_an_epoch_is_averaged_over_its_own_micro_batches():
    """5 micro-batches by 2: the last update has one, whose gradient must not be halved. SGD would show it."""
    opts = ("TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.CLIP_GRAD", 0.0, "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.WEIGHT_DECAY", 0.0,
            "TRAIN.OPTIMIZER.MOMENTUM", 0.5)
    data = batches(1)
    config = tiny("TRAIN.ACCUMULATION_STEPS", 2, *opts)
    alone = train(config, data, frozen_statistics(config))
    config = tiny("TRAIN.ACCUMULATION_STEPS", 1, *opts)
    plain = train(config, data, frozen_statistics(config))
    assert torch.equal(weights(alone), weights(plain))
    config = tiny("TRAIN.ACCUMULATION_STEPS", 2, *opts)
    assert train(config, batches(5)).step == 3


@pytest.mark.parametrize("first, last", [(0, 0), (1, 2), (3, 3)])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_skipped_update_leaves_no_trace(optimizer, first, last):
    """Updates with a loss that is not finite are as if their batches had not been there (but for the schedule)."""
    config = tiny("TRAIN.LR_SCHEDULER.NAME", "step", "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.OPTIMIZER.NAME", optimizer)
    data = batches(4)
    bad = [(images * float("nan") if first <= i <= last else images, targets)
           for i, (images, targets) in enumerate(data)]
    with_bad, without = train(config, bad), train(config, data[:first] + data[last + 1:])
    assert with_bad.step == 4
    for a, b in zip(with_bad.model.state_dict().items(), without.model.state_dict().items(), strict=True):
        assert a[0].endswith("num_batches_tracked") or torch.equal(a[1], b[1]), a[0]
    for a, b in zip(with_bad.optimizer.state.values(), without.optimizer.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_infinite_loss_with_a_finite_gradient_is_skipped():
    config = tiny()
    state = make_state(config, Precision("fp32", CPU))
    updater = engine._Updater(config, state)
    before = weights(state)
    finite = state.model(batches(1)[0][0]).sum()
    updater.backward(finite + float("inf"))
    assert updater.update()[1].item() is True
    assert torch.equal(weights(state), before)


def test_too_many_skipped_updates_stop_the_run(tmp_path):
    """The count goes on over the end of an epoch, which is after 7 updates."""
    result = run([FAULTS, "bad_loss_at_steps", 5, 99, "--",
                  *arguments(tmp_path, "TRAIN.MAX_SKIPPED", 4, "PRINT_FREQ", 1)])
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "4 updates in a row were skipped" in result.stdout and "TRAIN.BASE_LR" in result.stdout
    assert "updates were skipped" in (folder(tmp_path) / "log_rank0.txt").read_text()


def test_a_loss_that_is_bad_on_one_process_is_skipped_on_all(tmp_path):
    options = ("DATA.BATCH_SIZE", 20, "PRINT_FREQ", 1)
    result = run([*torchrun(2), FAULTS, "bad_loss_at_steps", 3, 4, 1, "--", *arguments(tmp_path, *options)])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("1 of the last 1 updates were skipped") == 2
    assert "Best top-1" in result.stdout


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_precisions_agree(dtype):
    config = tiny("AMP_DTYPE", dtype, "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.BASE_LR", 1e-3)
    data = batches(2)
    precision = Precision(dtype, CPU)
    assert precision.scaler().is_enabled() == (dtype == "fp16")
    state, reference = train(config, data, precision=precision), train(tiny(*["TRAIN.WARMUP_EPOCHS", 0]), data)
    seen = []
    state.model.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with precision.autocast(), torch.no_grad():
        state.model.eval()(data[0][0])
    assert seen == [Precision.DTYPES[dtype]]
    assert state.step == 2
    initial = weights(make_state(config, precision))
    assert not torch.equal(weights(state), initial)
    if dtype != "fp16":  # whose loss scale starts so high that first updates are skipped
        assert 1e-4 < (weights(state) - weights(reference)).norm() / weights(reference).norm() < 0.05


@pytest.mark.parametrize("mixup, cutmix, smoothing", [
    (0.8, 0.0, 0.1), (0.0, 1.0, 0.1), (0.0, 0.0, 0.1), (0.0, 0.0, 0.0), (0.8, 1.0, 0.0)])
def test_every_choice_of_loss(mixup, cutmix, smoothing):
    """Training runs, and the loss is the cross entropy with the targets that the choice makes."""
    config = tiny("AUG.MIXUP", mixup, "AUG.CUTMIX", cutmix, "MODEL.LABEL_SMOOTHING", smoothing)
    mix = build_mixup(config)
    assert (mix is None) == (mixup == cutmix == 0)
    data = batches(1)
    losses = []
    criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if mix else smoothing)
    state = make_state(config, Precision("fp32", CPU))
    record = engine._Progress.add_loss

    class Spy(engine._Progress):
        def add_loss(self, loss, images):
            losses.append(loss.item())
            record(self, loss, images)

    engine._Progress, original = Spy, engine._Progress
    try:
        import numpy as np
        np.random.seed(0)
        images, targets = (t.clone() for t in data[0])
        if mix:
            images, targets = mix(images, targets)
            assert torch.allclose(targets.sum(1), torch.ones(8)) and targets.min() >= smoothing / 10 - 1e-6
        logits = state.model.train()(images)
        expected = criterion(logits, targets).item()
        np.random.seed(0)
        train(config, [(data[0][0].clone(), data[0][1])], make_state(config, Precision("fp32", CPU)), mixup=mix)
    finally:
        engine._Progress = original
    assert losses == [pytest.approx(expected, rel=1e-6)]


def test_train_mode_statistics_are_the_mean_over_processes(tmp_path):
    """After an update two processes hold one network: the same weights and the mean of their BatchNorm statistics.

    An update whose loss is bad on one of them changes nothing on either.
    """
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import engine, distributed
from torch.nn.parallel import DistributedDataParallel
from tests.test_engine import *
distributed.init_distributed(CPU)
config = tiny()
state = make_state(config, Precision("fp32", CPU))
model = DistributedDataParallel(state.model, broadcast_buffers=False)
data = batches(1, seed=distributed.rank())
engine.train_one_epoch(config, state, model, Batches(data), Precision("fp32", CPU), None, NeverDue())
ours = state.model.state_dict()
gathered = distributed.gather_objects(ours)
assert all(torch.equal(gathered[0][k], gathered[1][k]) for k in ours)
before = {k: v.clone() for k, v in ours.items()}
if distributed.rank() == 1:
    data = [(data[0][0] * float("nan"), data[0][1])]
engine.train_one_epoch(config, state, model, Batches(data), Precision("fp32", CPU), None, NeverDue())
for key in ours:
    assert "num_batches" in key or torch.equal(ours[key], before[key]), f"a loss bad on one process changed {key}"
ours = before
local = []
for seed in (0, 1):
    single = make_state(config, Precision("fp32", CPU))
    single.model.train()(batches(1, seed=seed)[0][0])
    local.append(single.model.state_dict())
for key in ours:
    if "running" in key:
        torch.testing.assert_close(ours[key], (local[0][key] + local[1][key]) / 2, rtol=1e-6, atol=1e-7)
distributed.leave()
"""
    (tmp_path / "check.py").write_text(script)
    result = run([*torchrun(2), tmp_path / "check.py", main.__file__.rsplit(os.sep, 1)[0]])
    assert result.returncode == 0, result.stderr


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_host_waits_for_the_device_only_to_log(monkeypatch, dtype):
    """PyTorch raises at whatever would make it wait, from an epoch's beginning to its last log line."""
    cuda = torch.device("cuda")
    config = tiny("AMP_DTYPE", dtype, "PRINT_FREQ", 1000, "MODEL.DROP_PATH_RATE", 0.1, "TRAIN.EPOCHS", 2)
    precision = Precision(dtype, cuda)
    state = make_state(config, precision, updates_per_epoch=4, device=cuda)
    state.model.to(memory_format=torch.channels_last)
    state.ema = ModelEmaV3(state.model, decay=0.9)
    data = [(images.cuda(), targets.cuda()) for images, targets in batches(4)]
    mixup = build_mixup(config)
    train(config, data, state, precision, mixup)  # tunes kernels, makes the optimiser's state
    assert (state.epoch, state.step) == (1, 4)
    log, forbidden = engine._Progress.log, []

    def log_freely_at_the_end(progress, *args, **kwargs):
        forbidden.append(torch.cuda.get_sync_debug_mode())
        if state.batch == len(data):
            torch.cuda.set_sync_debug_mode("default")
        log(progress, *args, **kwargs)

    monkeypatch.setattr(engine._Progress, "log", log_freely_at_the_end)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(config, data, state, precision, mixup)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (state.epoch, state.step) == (2, 8) and forbidden == [2] * 4  # 2: error


# ---- evaluation ------------------------------------------------------------------------------------

def test_evaluate_against_a_plain_count():
    config = load_config(DIGITS, TINY + ["DATA.BATCH_SIZE", "50"])
    torch.manual_seed(1)
    model = build_model(config)
    loader = build_val_loader(config)
    result = evaluate(model, loader, Precision("fp32", CPU))
    model.eval()
    with torch.no_grad():
        logits, targets = map(torch.cat, zip(*[(model(x), y) for x, y in loader], strict=True))
    order = logits.argsort(1, descending=True)
    assert result["images"] == 360 == len(targets)
    assert result["acc1"] == 100 * (order[:, 0] == targets).sum().item() / 360
    assert result["acc5"] == pytest.approx(100 * (order[:, :5] == targets[:, None]).sum().item() / 360, rel=1e-12)
    picked = -logits.double().log_softmax(1)[range(360), targets]
    assert result["loss"] == pytest.approx(picked.mean().item(), rel=1e-6)


class ValBatches(list):
    """Batches of random images, as a loader gives them."""

    bad_images = list

    def __init__(self, *sizes):
        super().__init__((torch.randn(size, 3, 16, 16), torch.zeros(size, dtype=torch.int64)) for size in sizes)
        self.dataset = range(sum(sizes))


def test_evaluation_casts_the_weights_once():
    """And not in every batch."""
    model = build_model(load_config(DIGITS, TINY))
    names, casts = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}, []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in names:
                casts.append(names[args[0].data_ptr()])
            return function(*args, **(kwargs or {}))

    with Count():
        evaluate(model, ValBatches(4, 4, 4), Precision("bf16", CPU))
    again = {name for name in casts if casts.count(name) > 1}
    assert len(set(casts)) > 50 and all("_strip." in name or "grn." in name for name in again)  # small ones


def test_a_short_last_batch_is_not_compiled():
    shapes = []

    def compiler(graph, inputs):
        shapes.extend(tuple(t.shape) for t in inputs if t.ndim == 4 and t.shape[1:] == (3, 16, 16))
        return graph

    class Network(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1))

    model = Network(3 * 16 * 16, 10)
    model.compile(backend=compiler)
    assert evaluate(model, ValBatches(4, 4, 3), Precision("fp32", CPU))["images"] == 11
    assert shapes == [(4, 3, 16, 16)]


def test_evaluate_with_fewer_than_five_classes():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))

    class Loader(list):
        dataset, bad_images = range(5), list

    loader = Loader([(torch.randn(5, 4, 1, 1), torch.tensor([0, 1, 2, 0, 1]))])
    assert evaluate(model, loader, Precision("fp32", CPU))["acc5"] == 100.0


def test_evaluate_refuses_to_lose_an_image():
    class Loader(list):
        dataset, bad_images = range(6), list

    loader = Loader([(torch.randn(5, 4, 1, 1), torch.zeros(5, dtype=torch.int64))])
    with pytest.raises(RuntimeError, match="5 images were evaluated, but the validation set has 6"):
        evaluate(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), loader, Precision("fp32", CPU))


def test_throughput_counts_images():
    images = torch.randn(4, 3, 16, 16)
    calls = []

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            calls.append(len(x))
            __import__("time").sleep(0.01)
            return x

    speed = measure_throughput(Slow(), images, Precision("fp32", CPU), repeats=6)
    assert len(calls) == 8 and 40 < speed < 400


def test_precision_auto_is_fp32_on_the_cpu():
    assert Precision("auto", CPU).name == "fp32"


# ---- torch.compile ---------------------------------------------------------------------------------

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("setting, device, capability, deterministic, is_compiled", [
    ("auto", CPU, None, False, False), ("auto", CUDA, (8, 0), False, True), ("auto", CUDA, (7, 0), False, True),
    ("auto", CUDA, (6, 1), False, False), ("auto", CUDA, (9, 0), True, False), ("off", CUDA, (9, 0), False, False),
    ("on", CPU, None, False, True), ("on", CUDA, (9, 0), True, True),
])
def test_where_it_is_on(monkeypatch, setting, device, capability, deterministic, is_compiled):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(engine, "EARLY", {"as in PyTorch 2.11": True})
    network = nn.Linear(2, 2)
    compiled = compile_network(network, setting, device, deterministic)
    assert isinstance(compiled, CompiledNetwork) == is_compiled
    assert is_compiled or compiled is network


def test_auto_needs_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    network = nn.Linear(2, 2)
    assert compile_network(network, "auto", CUDA) is network


def test_auto_needs_a_pytorch_that_can_fall_back(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(engine, "EARLY", {})
    network = nn.Linear(2, 2)
    with caplog.at_level(logging.INFO, "strip_mlp"):
        assert compile_network(network, "auto", CUDA) is network
    assert "not compiling the network: if the backward pass fails to compile" in caplog.text
    assert isinstance(compile_network(network, "on", CUDA), CompiledNetwork)


@pytest.mark.parametrize("version, is_compiled", [("2.8.0", False), ("2.11.0+cu130", True), ("2.14.1", True)])
def test_checkpointed_networks_need_a_newer_pytorch(monkeypatch, version, is_compiled):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(engine, "EARLY", {"as in PyTorch 2.11": True})
    network = nn.Linear(2, 2)
    network.grad_checkpointing = True
    assert isinstance(compile_network(network, "auto", CUDA), CompiledNetwork) == is_compiled
    if not is_compiled:
        with pytest.raises(InputError, match="PyTorch 2.8.0 counts BatchNorm's batches twice .* leave out"):
            compile_network(network, "on", CUDA)


def fail(x):
    raise TorchDynamoException("no compiler\nand much more")


def test_a_failure_is_said_and_training_goes_on(caplog):
    network = nn.Linear(2, 2)
    compiled = CompiledNetwork(network, may_fail=True)
    compiled.run = fail
    x = torch.ones(3, 2)
    with caplog.at_level(logging.WARNING, "strip_mlp"):
        assert torch.equal(compiled(x), network(x))
    assert "COULD NOT BE COMPILED (TorchDynamoException: no compiler)" in caplog.text and "much more" not in caplog.text
    caplog.clear()
    compiled(x).sum().backward()  # not tried again
    assert not caplog.text and network.weight.grad is not None


def test_a_failure_is_an_error_where_compiling_was_asked_for():
    compiled = CompiledNetwork(nn.Linear(2, 2), may_fail=False)
    compiled.run = fail
    with pytest.raises(TorchDynamoException):
        compiled(torch.ones(3, 2))


def test_other_errors_are_not_the_compilers():
    compiled = CompiledNetwork(nn.Linear(2, 2), may_fail=True)
    compiled.run = compiled.network
    with pytest.raises(RuntimeError, match="shapes"):
        compiled(torch.ones(3, 5))


@pytest.mark.slow
def test_compiled_it_trains_as_without_and_the_cache_serves_the_next_run(monkeypatch, tmp_path):
    """Gradients on the CPU, with the options that a GPU gets; a second compilation finds the first's result."""
    from torch._dynamo.utils import counters

    from models import StripMLPNet

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    network = StripMLPNet(img_size=32, embed_dim=8, depths=(1, 1, 1, 1), num_classes=3, drop_path_rate=0.0)
    images = torch.randn(4, 3, 32, 32)
    expected = torch.autograd.grad(network(images).square().sum(), list(network.parameters()))
    for hits in (0, 1):
        torch.compiler.reset()
        counters.clear()
        compiled = compile_network(network, "on", CPU)
        found = torch.autograd.grad(compiled(images).square().sum(), list(network.parameters()))
        for value, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-3, atol=1e-4)
        found_again = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
        assert (found_again > 0) == bool(hits)


def test_the_average_of_a_short_run_is_not_its_random_start():
    """With the default decay of 0.9999 alone, 22 updates would keep 99.8 % of the initial weights."""
    config = load_config(DIGITS, [*TINY, "TRAIN.EMA.ENABLED", True, "TRAIN.EMA.DECAY", 0.9999])
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.zero_()
    ema = engine.build_ema(config, model)
    model.weight.data.fill_(1.0)
    for step in range(1, 23):
        ema.update(model, step=step)
    assert ema.module.weight.item() > 0.99


def test_auto_does_not_compile_synchronised_norms_and_says_so(monkeypatch, caplog):
    """Dynamo would break the graph at every one."""
    monkeypatch.setattr(engine.logger, "propagate", True)
    monkeypatch.setattr(engine, "_can_compile", lambda device: True)
    monkeypatch.setattr(engine, "EARLY", {"as in PyTorch 2.11": True})
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4))
    with caplog.at_level("INFO", "strip_mlp"):
        assert engine.compile_network(model, "auto", torch.device("cuda")) is model
    assert "not compiling the network: SyncBatchNorm (TRAIN.SYNC_BN)" in caplog.text
