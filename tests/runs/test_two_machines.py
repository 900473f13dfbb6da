"""Two machines for real: two network namespaces with a link between them, torchrun's rendezvous across it."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from tests.helpers import FAULTS, arguments, differences
from tests.processes import ROOT, environment, run, torchrun
from tests.runs.test_resume import OPTIONS, final_state

ADDRESSES = {"strip_a": "192.0.2.1", "strip_b": "192.0.2.2"}  # reserved for examples (RFC 5737); in our namespaces only
LINK = "strip_link"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("ip") or os.geteuid() != 0, reason="network namespaces need root and ip"),
]


def ip(*words):
    subprocess.run(["ip", *words], check=True)


@pytest.fixture
def machines():
    """The two namespaces; their end of the link has the same name in both."""
    for name in ADDRESSES:
        ip("netns", "add", name)
    try:
        ip("link", "add", LINK, "netns", "strip_a", "type", "veth", "peer", "name", LINK, "netns", "strip_b")
        for name, address in ADDRESSES.items():
            ip("-n", name, "address", "add", f"{address}/24", "dev", LINK)
            ip("-n", name, "link", "set", LINK, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(ADDRESSES)
    finally:
        for name in ADDRESSES:
            subprocess.run(["ip", "netns", "delete", name])


def train(output, attempt: str, *script) -> list[str]:
    """Runs a training with a process on either machine; what the two launchers and their processes print."""
    launchers = []
    for name, address in ADDRESSES.items():
        command = [
            "ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
            "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", attempt, "--rdzv_endpoint",
            f"{ADDRESSES['strip_a']}:29500", "--rdzv_conf", f"is_host={name == 'strip_a'}", "--local_addr", address,
            *map(str, script),
            *arguments(output, *OPTIONS[2], "HANG_MINUTES", 0.2),
        ]
        launchers.append(subprocess.Popen(command, cwd=ROOT, env=environment(GLOO_SOCKET_IFNAME=LINK), text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True))
    outputs = []
    for launcher, patience in zip(launchers, (400, 60), strict=True):
        try:
            outputs.append(launcher.communicate(timeout=patience)[0])
        except subprocess.TimeoutExpired:  # torchrun's own wait for a rendezvous that it cannot reach takes minutes
            os.killpg(launcher.pid, signal.SIGKILL)
            outputs.append(launcher.communicate()[0])
    return outputs


def test_a_broken_link_ends_the_run_and_the_next_one_resumes_it(machines, tmp_path):
    """Either side names the process of the other; the same command then ends with the bits of a run on one machine."""
    outputs = train(tmp_path, "first", FAULTS, "cut_link_at_step", 7, LINK, "--")
    for output, other in zip(outputs, (1, 0), strict=True):
        message = rf"no answer within HANG_MINUTES from rank {other} \(process \d+ on"
        assert re.search(message, output), output
    for name in machines:
        ip("-n", name, "link", "set", LINK, "up")
    outputs = train(tmp_path, "second", "main.py")
    assert "7 updates done" in outputs[0], outputs
    reference = tmp_path / "reference"
    assert run([*torchrun(2), "main.py", *arguments(reference, *OPTIONS[2])]).returncode == 0
    assert differences(final_state(reference), final_state(tmp_path)) == []
