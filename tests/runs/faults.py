"""main.py with one fault injected, for tests: ``python tests/runs/faults.py FAULT [VALUE] -- ARGUMENTS OF MAIN``."""

import gc
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

import distributed
import engine
import main
from data import loader

FAULTS = {}


def fault(function):
    FAULTS[function.__name__] = function
    return function


def _before_update(action, step: int) -> None:
    """Calls ``action`` just before the update after ``step`` updates."""
    update = engine._Updater.update

    def patched(self):
        if self.state.step == step:
            action()
        return update(self)

    engine._Updater.update = patched


def _at_half_of_checkpoint(nth: str, action) -> None:
    """Does something when half of the n-th checkpoint that this process writes is on the disk."""
    save, count = torch.save, 0

    def patched(content, file):
        nonlocal count
        count += 1
        save(content, file)
        if count == int(nth):
            file.flush()
            os.truncate(file.fileno(), file.tell() // 2)
            action()

    torch.save = patched


def _kill() -> None:
    """SIGKILL to this process, which says so first: a launcher may report another one that failed because of it."""
    print("killed by the fault", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def _only_on_rank(rank: str, action):
    return lambda: action() if distributed.rank() == int(rank) else None


@fault
def kill_at_step(step, rank="0"):
    """SIGKILL to one process in the middle of an update."""
    _before_update(_only_on_rank(rank, _kill), int(step))


@fault
def kill_once_at_step(step, marker):
    """As kill_at_step on rank 0, but only the first time, which leaves the file ``marker`` behind."""

    def action():
        if distributed.rank() == 0 and not os.path.exists(marker):
            Path(marker).touch()
            _kill()

    _before_update(action, int(step))


@fault
def stop_once_at_step(step, marker, rank="1"):
    """SIGSTOP to one process, the first time: it is there and never answers, as one that waits for a dead disk."""

    def action():
        if distributed.rank() == int(rank) and not os.path.exists(marker):
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    _before_update(action, int(step))


@fault
def cut_link_at_step(step, link):
    """The first process's machine loses its network."""
    _before_update(_only_on_rank(0, lambda: subprocess.run(["ip", "link", "set", link, "down"], check=True)), int(step))


@fault
def kill_while_saving(nth):
    """SIGKILL when half of the n-th checkpoint is written."""
    _at_half_of_checkpoint(nth, _kill)


@fault
def signal_at_step(step, name, rank="0"):
    """A signal to one process in the middle of an update."""
    _before_update(_only_on_rank(rank, lambda: os.kill(os.getpid(), getattr(signal, name))), int(step))


@fault
def hang_at_step(step, seconds):
    """An update that takes very long, and says so on the terminal when it begins."""
    _before_update(lambda: (print("hangs", flush=True), time.sleep(int(seconds))), int(step))


@fault
def hang_at_batch(batch, seconds):
    """A micro-batch of the first epoch that takes very long, and says so on the terminal when it begins."""
    backward = engine._Updater.backward

    def patched(self, loss):
        if (self.state.epoch, self.state.batch) == (0, int(batch)):
            print("hangs", flush=True)
            time.sleep(int(seconds))
        return backward(self, loss)

    engine._Updater.backward = patched


@fault
def slow_start_of_workers(seconds):
    """Data workers that take long to get ready, and say so on the terminal."""
    get_ready = loader._end_with_the_parent

    def patched(worker):
        print("hangs", flush=True)
        time.sleep(int(seconds))
        get_ready(worker)

    loader._end_with_the_parent = patched


@fault
def interrupt_evaluation(name):
    """A signal in the middle of an evaluation."""

    def evaluate(*args):
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(1000)

    engine.evaluate = evaluate


@fault
def raise_at_step(step, rank="0"):
    """An unexpected exception in one process."""

    def action():
        raise RuntimeError("injected")

    _before_update(_only_on_rank(rank, action), int(step))


@fault
def kill_data_worker_at_step(step):
    """SIGKILL to a data worker."""

    def action():
        multiprocessing.active_children()[0].kill()
        time.sleep(1)  # until the news of it

    _before_update(action, int(step))


@fault
def stop_data_worker_at_step(step):
    """SIGSTOP to a data worker, which then neither works nor ends."""
    _before_update(lambda: os.kill(multiprocessing.active_children()[0].pid, signal.SIGSTOP), int(step))


@fault
def kill_data_worker_while_saving(nth):
    """SIGKILL to a data worker when half of the n-th checkpoint is written."""

    def action():
        multiprocessing.active_children()[0].kill()
        time.sleep(1)

    _at_half_of_checkpoint(nth, action)


@fault
def full_disk_for_the_log(step):
    """From update ``step`` on nothing can be written to the log file, metrics.jsonl and TensorBoard's events."""

    def refuse(*args):
        raise OSError(28, "No space left on device")

    def action():
        for handler in main.logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.stream = open("/dev/full", "w")
        for writer in [value for value in gc.get_objects() if isinstance(value, main.log.MetricsWriter)]:
            writer.file = open("/dev/full", "w")
        LocalFileSystem.append = refuse

    _before_update(action, int(step))


@fault
def disk_full_while_saving(nth):
    """The disk is full at the n-th checkpoint: half of it is written."""

    def action():
        raise OSError(28, "No space left on device")

    _at_half_of_checkpoint(nth, action)


@fault
def bad_loss_at_steps(first, last, rank="0"):
    """The loss of one process is not a number from update ``first`` to update ``last``."""
    backward = engine._Updater.backward

    def patched(self, loss):
        is_hit = distributed.rank() == int(rank) and int(first) <= self.state.step <= int(last)
        return backward(self, loss * float("nan") if is_hit else loss)

    engine._Updater.backward = patched


if __name__ == "__main__":
    end = sys.argv.index("--")
    name, *values = sys.argv[1:end]
    FAULTS[name](*values)
    torch.set_num_threads(1)
    sys.exit(main.main(sys.argv[end + 1:]))
