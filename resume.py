"""Resuming a run: the checkpoint that it resumes from, whether it is finished, and restoring it."""

import logging
from pathlib import Path

import checkpoint
import distributed
import report
from hub import weights_file
from models import InputError
from resume_checks import check_run
from same_run import accept_changes
from train_state import Checkpointer, TrainState

logger = logging.getLogger("strip_mlp")


def find_resume(config, folder: Path, allow_changes: bool) -> tuple[Path | None, dict | None, list[dict]]:
    """The newest good checkpoint in ``folder``, else the one that the config names, else None.

    Also returns its content, if this process has read it already, and the changes of settings so far.

    Raises:
        InputError: TRAIN.AUTO_RESUME is False but the folder already holds a run, or the folder's run has other
            settings.
    """
    path, content, changes = None, None, []
    if distributed.rank() == 0:
        if config.TRAIN.AUTO_RESUME:
            path, content = checkpoint.newest_checkpoint(folder) or (None, None)
        elif not config.MODEL.RESUME and checkpoint.list_checkpoints(folder):
            raise InputError(f"TRAIN.AUTO_RESUME is False, but {folder} already holds the checkpoints of a run; give "
                             "the new run another --tag, or delete the folder")
        if path and config.MODEL.RESUME:
            logger.info(f"this run has its own checkpoints; {config.MODEL.RESUME} is ignored")
        elif config.MODEL.RESUME:
            path = weights_file(config.MODEL.RESUME)
            content = checkpoint.load_file(path)
        if content:
            with checkpoint.naming(path):
                check_run(content)
        if content and content.keys() >= {"config", "layout"}:  # a training; anything else cannot be resumed
            changes = accept_changes(content, path, config, allow_changes)
    return distributed.broadcast_object(path), content, changes


def is_finished(content: dict | None, config, training_images: int) -> bool:
    """Whether a checkpoint is the last of this run; one trained on another number of images is not."""
    is_whole = bool(content) and content.keys() >= {"epoch", "layout"}
    return is_whole and (content["epoch"], content["layout"].get("training_images")) == (
        config.TRAIN.EPOCHS, training_images)


def report_finished(content: dict | None, folder: Path) -> None:
    """Logs the result of a finished run, on the first process, which has read its last checkpoint."""
    if distributed.rank() == 0:
        if not (folder / "curves.png").is_file():  # the run was killed after its last checkpoint
            report.draw_curves(folder)
        logger.info(f"this run is finished, nothing was trained: best top-1 {content['max_accuracy']:.3f} % in "
                    f"{content['epoch']} epochs ({content['step']} updates). To continue training, raise TRAIN.EPOCHS "
                    f"and add --allow-changes.\n{report.whereabouts(folder)}")


def resume(path: Path, content: dict | None, state: TrainState, checkpointer: Checkpointer, folder: Path) -> None:
    """Restores a checkpoint and sets aside those in ``folder`` that would seem newer."""
    content = content or checkpoint.load_file(path)
    with checkpoint.naming(path):
        state.load_state_dict(content)
    if state.step != content["step"]:  # updates are counted differently now, so first save the run under its new step
        if not checkpointer.save(state):
            raise InputError(f"{path} was resumed with another batch size, but the checkpoint with the new number of "
                             f"updates could not be written to {folder}; free space and rerun the same command")
    if distributed.rank() == 0:
        checkpoint.set_aside_after(state.step, folder)
