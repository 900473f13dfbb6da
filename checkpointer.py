"""When a run saves itself: at the ends of epochs, every so many updates or minutes, and when it is told to stop."""

import logging
import signal
import time
from pathlib import Path

import checkpoint
import distributed
from config import to_dict
from state import TrainState

logger = logging.getLogger("strip_mlp")

PREEMPTED = 75  # exit status of a run that saved itself and stopped on a signal; the same command goes on (EX_TEMPFAIL)
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SAME_SIGNAL = 5  # seconds
_NOTHING, _SAVE, _STOP = 0, 1, 2


class Preempted(Exception):
    """The run has saved itself, as far as it could, and stops because of a signal."""


class Checkpointer:
    """Saves a run into its folder. All processes call every method together; rank 0 writes.

    While it is entered as a context, the first SIGTERM, SIGUSR1 or SIGINT to reach any process makes all of them finish
    their update, save and stop. One that comes over 5 seconds after it acts as it always does; sooner, it is the same
    signal again, which launchers pass on to processes that got it already.

    Args:
        config: the run's config, saved along.
        folder: where the checkpoints go.

    ``about`` holds what a checkpoint says of the network for those who read it, beside what resume restores.
    """

    def __init__(self, config, folder: Path):
        self.config, self.folder = config, folder
        self.about = {"config": to_dict(config)}
        self.signal: signal.Signals | None = None
        self.saved_at = time.monotonic()

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *exception):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def is_due(self, state: TrainState) -> bool:
        """Whether to save after this update, agreed by all processes."""
        steps, minutes = self.config.SAVE_STEPS, self.config.SAVE_MINUTES
        wish = _NOTHING
        overdue = minutes and time.monotonic() - self.saved_at > 60 * minutes
        if overdue or steps and state.step % steps == 0:
            wish = _SAVE
        if self.signal:
            wish = _STOP
        return distributed.agree_on_largest(wish) != _NOTHING

    def save(self, state: TrainState, is_best: bool = False) -> bool:
        """Saves the run. A failure to write is logged and the run goes on; older checkpoints stay as they are.

        Returns:
            Whether it was saved.

        Raises:
            Preempted: a signal has reached any of the processes.
        """
        is_saved = True
        content = state.state_dict() | self.about
        if distributed.rank() == 0:
            try:
                path = checkpoint.save_checkpoint(content, self.folder, is_best, self.config.KEEP_CHECKPOINTS)
                logger.info(f"saved {path}{' (best)' if is_best else ''}")
            except OSError as error:
                is_saved = False
                logger.error("COULD NOT SAVE A CHECKPOINT: %s. Older ones are untouched and the run goes on; make "
                             "room, or what comes after them may be lost", error)
        is_saved = distributed.broadcast_object(is_saved)
        self.saved_at = time.monotonic()
        if distributed.agree_on_largest(_STOP if self.signal else _NOTHING) == _STOP:
            raise Preempted(self.signal.name if self.signal else "signal to another process")
        return is_saved

    def _receive(self, number: int, frame) -> None:
        if self.signal is None:
            self.signal, self.received_at = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self.received_at > _SAME_SIGNAL:
            signal.signal(number, self.handlers[number])
            signal.raise_signal(number)
