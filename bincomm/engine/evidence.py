"""What is kept for inspection when a run ends because its steps are not finite."""

from pathlib import Path

from bincomm.config import PretrainConfig
from bincomm.data.loader import Loader
from bincomm.distributed.ranks import Ranks
from bincomm.engine.batches import Views
from bincomm.engine.checkpoints import save_checkpoint
from bincomm.engine.guard import Guard
from bincomm.engine.state import RunState


def keep_evidence(
    config: PretrainConfig,
    run: Path,
    step: int,
    lr: float,
    state: RunState,
    batch: tuple[Views, list[int]],
    loader: Loader,
    ranks: Ranks,
) -> str:
    """Save the state after so many steps, and every rank's batch, and put what happened into words.

    Args:
        lr: the peak learning rate.
        batch: this rank's crops, the messages that are stored of them, and the numbers of their images.
    """
    collected = state.collect(step)
    views, images = batch
    sample = {
        **{name: None if part is None else part.cpu() for name, part in views._asdict().items()},
        "images": [loader.images.name(image) for image in images],
    }
    outcome = f"the state and the batch are in {run}/not_finite*.ckpt"
    try:
        if ranks.rank == 0:
            save_checkpoint(run / "not_finite.ckpt", collected)
        save_checkpoint(run / f"not_finite_batch_{ranks.rank}.ckpt", sample)
    except OSError as error:
        outcome = f"the state and the batch could not be saved ({error})"
    ranks.gather(None)  # the first to end ends the others
    return (
        f"the loss or its gradient was not finite in more than {Guard.LIMIT} steps in a row, up to step "
        f"{step}; {outcome}, and {run / 'checkpoints'} holds the last good checkpoints. Lower lr (now "
        f"{lr:.2g}) or clip (now {config.clip:g}), or use precision fp32 (now {config.precision}), and "
        "begin again with another --output."
    )
