"""Whole checkpoints, configs, metrics and map files with anything in them: each works or ends in an InputError.

Never another exception, a crash, seconds of computing, gigabytes, a file that is no business of the reader, a socket or
a process. The ordinary suite tries a fixed few; ``pytest -m slow tests/fuzz`` tries 10,000.
"""

import json
import resource
import time
import warnings

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import checkpoint
import plots
from config import load_config, to_dict
from data.zipped import read_map
from inference import image_shape, load_network
from models import build_model, load_pretrained
from resume import accept_changes, is_finished
from resume_checks import check_run
from tests.fuzz.mutations import ATTACKS, is_small, mutate, mutated, mutated_bytes
from tests.helpers import DIGITS, TINY, differences, save_network
from tests.test_resume import training
from tests.watch import Watch
from utils import InputError, input_errors

CPU_SECONDS = 10  # for one example; a machine under load is slower
GIGABYTES = 1.5  # more than before, in this process
SNIPPETS = [attack.encode(errors="surrogatepass") for attack in ATTACKS] + [
    b"\xff", b"\x00", b"\n", b"\t", b"&a [*a]", b"<<: *a\n", b"SEED: 1\n", b"BASE: [a.yaml]\n", b"BASE: /etc/passwd\n",
    b"[" * 3000, b"{a: " * 300, b".inf", b"NaN", b"1e999", b"\xef\xbb\xbf", b"!!binary x", b"? ", b"- ", b": ",
    b"'", b'"',
]


class ends_well:
    """As a context around a reader: it works, or an InputError says why not; and nothing else happens."""

    def __init__(self, *allowed, refusal=InputError):
        self.watch, self.refusal = Watch(allowed), refusal

    def __enter__(self):
        self.start = time.process_time()
        self.warnings = warnings.catch_warnings()
        self.warnings.__enter__()
        warnings.simplefilter("ignore")
        self.watch.__enter__()
        return self

    def __exit__(self, kind, error, traceback):
        self.watch.__exit__()
        self.warnings.__exit__(None, None, None)
        assert self.watch.events == []
        assert time.process_time() - self.start < CPU_SECONDS
        self.is_refused = isinstance(error, self.refusal)
        if self.is_refused:
            lines = str(error).split("\n")
            assert len(lines) <= 102 and max(map(len, lines)) < 21_000
        return self.is_refused


def save(content, path):
    """Saves what PyTorch can save; other examples are no files that anybody has."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(content, path)
    except Exception:
        assume(False)


# ---- what is tried -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A folder, and a checkpoint's content as ``load_network`` reads it, of a network as small as can be."""
    config = load_config(DIGITS, [*TINY, "MODEL.STRIP_MLP.EMBED_DIM", "4"])
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("network")
    return folder, torch.load(save_network(folder / "good.pth", config, build_model(config)), weights_only=True)


def try_network(network, rng):
    folder, content = network
    content = mutated(content, rng)
    if isinstance(content.get("config"), dict) and rng.random() < 0.4:  # most entries are weights; these matter more
        mutate(content["config"], rng)
    path = folder / "odd.pth"
    save(content, path)
    with ends_well(path):
        model, config, classes = load_network(path)
        assert len(classes) == config.MODEL.NUM_CLASSES
        if config.MODEL.TYPE == "strip_mlp" and config.DATA.IMG_SIZE <= 64:
            with torch.inference_mode():
                assert model(torch.zeros(1, *image_shape(config))).shape == (1, len(classes))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder, a training, and a good checkpoint's content."""
    state = training()
    folder = tmp_path_factory.mktemp("run")
    torch.save(state.state_dict(), folder / "ckpt_step_00000001.pth")
    return folder, state, checkpoint.load_file(folder / "ckpt_step_00000001.pth")


def try_run(run, rng):
    """What main.py reads of a run's checkpoint before it has built the training."""
    folder, _, content = run
    path = folder / "ckpt_step_00000005.pth"
    config = load_config(DIGITS)
    about = {key: content[key] for key in ("epoch", "step", "layout", "max_accuracy")}
    about |= {"config": to_dict(config), "changes": [{"step": 2, "keys": {"TRAIN.EPOCHS": "2 -> 3"}}]}
    save(mutated(about, rng), path)
    with ends_well(path, folder / "ckpt_step_00000001.pth"):
        path, found = checkpoint.newest_checkpoint(folder)
        check_run(found)
        if found.keys() >= {"config", "layout"}:
            yaml.safe_dump(accept_changes(found, path, config, rng.random() < 0.5))
        if is_finished(found, config, 1437):
            assert f"{found['max_accuracy']:.3f} {found['epoch']} {found['step']}"


def try_resume(run, rng):
    folder, state, content = run
    path = folder / "ckpt_step_00000005.pth"
    save(mutated(content, rng), path)
    before = None
    with ends_well(path, folder / "ckpt_step_00000001.pth") as end, input_errors():
        _, found = checkpoint.newest_checkpoint(folder)
        before = state.state_dict()
        before = before | {"model": {key: value.clone() for key, value in before["model"].items()}}
        state.load_state_dict(found)
    if end.is_refused:
        assert differences(state.state_dict()["model"], before["model"]) == [] and state.epoch == before["epoch"]
        return
    for parameter in state.model.parameters():  # what was restored can be trained on
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    torch.rand(1)


def try_pretrained(network, rng):
    folder, content = network
    path = folder / "odd.pth"
    save(mutated({"model": content["model"]}, rng), path)
    model = build_model(load_config(DIGITS, [*TINY, "MODEL.STRIP_MLP.EMBED_DIM", "4", "MODEL.NUM_CLASSES", "7"]))
    with ends_well(path), input_errors():
        load_pretrained(model, checkpoint.load_file(path))
        assert all(value.isfinite().all() for value in model.state_dict().values())


def try_config(network, rng):
    folder, _ = network
    path = folder / "odd.yaml"
    values = to_dict(load_config(DIGITS))
    try:
        text = yaml.safe_dump(mutated(values, rng) if rng.random() < 0.7 else values).encode(errors="surrogatepass")
    except (yaml.YAMLError, RecursionError):
        assume(False)
    path.write_bytes(mutated_bytes(text, rng, SNIPPETS) if rng.random() < 0.5 else text)
    with ends_well(path):
        config = load_config(path, ["SEED", rng.choice(ATTACKS)] if rng.random() < 0.2 else [])
        assert load_config(path, []).DATA.IMG_SIZE == config.DATA.IMG_SIZE


def try_metrics(network, rng):
    folder, _ = network
    record = {"kind": "train", "step": 3, "epoch": 0, "epochs": 0.5, "loss": 1.0, "lr": 0.1}
    found = [mutated(record, rng) if rng.random() < 0.5 else record for _ in range(5)]
    assume(is_small(found))
    try:
        lines = list(map(json.dumps, found))
    except (TypeError, ValueError, RecursionError):
        assume(False)
    path = folder / "metrics.jsonl"
    path.write_bytes(mutated_bytes("\n".join(lines).encode(), rng, SNIPPETS))
    with ends_well(path):
        for line, record in plots.parse_metrics(path):
            assert record is None or json.loads(line)["epochs"] == record["epochs"]
        plots.read_metrics(path)


def try_map(network, rng):
    folder, _ = network
    path = folder / "map.txt"
    path.write_bytes(mutated_bytes(b"".join(b"%d/a.jpg\t%d\n" % (i, i) for i in range(4)), rng, SNIPPETS))
    with ends_well(path):
        members, labels, names = read_map(path, 10)
        assert len(members) == len(labels) and max(labels) < len(names) <= 10


EXAMPLES = {  # in the ordinary suite, and in the slow proof
    try_network: (10, 2000),
    try_run: (15, 1000),
    try_resume: (15, 3000),
    try_pretrained: (8, 1000),
    try_config: (25, 1500),
    try_metrics: (15, 500),
    try_map: (25, 1000),
}


def fuzz(function, request, examples):
    subject = request.getfixturevalue("run" if function in (try_run, try_resume) else "network")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=True))
    def attempt(rng):
        function(subject, rng)

    attempt()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIGABYTES * 2**20  # KiB


@pytest.mark.parametrize("function", EXAMPLES, ids=lambda function: function.__name__)
def test_a_few(function, request):
    fuzz(function, request, EXAMPLES[function][0])


@pytest.mark.slow
@pytest.mark.parametrize("function", EXAMPLES, ids=lambda function: function.__name__)
def test_ten_thousand(function, request):
    fuzz(function, request, EXAMPLES[function][1])
