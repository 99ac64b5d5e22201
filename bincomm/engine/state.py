"""The state of a run: everything that determines the steps to come, saved and resumed in parts."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

import torch

from bincomm.building import hash_seed
from bincomm.config import PretrainConfig
from bincomm.data.loader import Loader, merge_states
from bincomm.distributed.ranks import Ranks
from bincomm.distributed.sharding import gather_tensors
from bincomm.engine.accumulation import get_random_state, set_random_state
from bincomm.engine.checkpoints import Checkpoints, load_checkpoint
from bincomm.engine.metrics import MetricsWindow
from bincomm.engine.run import from_anywhere, keep_run, refuse_differences


class Part(Protocol):
    """A part of a run's state. All ranks call both methods; what is saved is complete on rank 0 at least."""

    def save(self, ranks: Ranks) -> Any:
        """The part's state, copied to the CPU."""

    def load(self, state: Any, ranks: Ranks) -> None:
        """Continue from a state, which another number of ranks may have saved."""


class Replicated:
    """A part that is the same on all ranks, its tensors possibly split over them.

    Args:
        state_dict: returns its state.
        load_state_dict: loads it.
    """

    def __init__(self, state_dict: Callable[[], Any], load_state_dict: Callable[[Any], Any]):
        self.state_dict, self.load_state_dict = state_dict, load_state_dict

    def save(self, ranks: Ranks) -> Any:
        """The complete state, on rank 0."""
        return gather_tensors(self.state_dict(), keep=ranks.rank == 0)

    def load(self, state: Any, ranks: Ranks) -> None:
        """Load the complete state, or this rank's shard of it."""
        self.load_state_dict(state)


class LoaderPart:
    """The position in the data, and the unusable images that any rank has met."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def save(self, ranks: Ranks) -> Any:
        """One state for any number of ranks."""
        return merge_states(ranks.gather(self.loader.state_dict()))

    def load(self, state: Any, ranks: Ranks) -> None:
        """Continue at that position."""
        self.loader.load_state_dict(state)


class WindowPart:
    """The metrics that each rank has gathered since the last report."""

    def __init__(self, window: MetricsWindow):
        self.window = window

    def save(self, ranks: Ranks) -> Any:
        """A state for every rank."""
        return ranks.gather(self.window.state_dict())

    def load(self, state: Any, ranks: Ranks) -> None:
        """Continue with this rank's; with another number of ranks, or another `log_every`, the window begins
        empty."""
        if len(state) == ranks.world and self.window.fits(state[ranks.rank]):
            self.window.load_state_dict(state[ranks.rank])


class RandomPart:
    """The random numbers that each rank draws in its networks, for example the paths that are dropped.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def save(self, ranks: Ranks) -> Any:
        """A state for every rank."""
        return ranks.gather(get_random_state(ranks.device))

    def load(self, state: Any, ranks: Ranks) -> None:
        """Continue with this rank's; with another number of ranks each rank gets a new seed."""
        if len(state) == ranks.world:
            set_random_state(ranks.device, state[ranks.rank])
        else:
            # Another seed for every saved state and every rank; the sum stands for the state.
            torch.manual_seed(hash_seed(self.seed + int(state[0][0].sum()), -ranks.rank))


class RunState:
    """Saves and resumes the parts of a run; all ranks call, and rank 0 writes.

    Args:
        parts: by their names in a checkpoint.
        checkpoints: the run's.
    """

    def __init__(
        self, config: PretrainConfig, parts: Mapping[str, Part], checkpoints: Checkpoints, ranks: Ranks
    ):
        self.config, self.parts, self.checkpoints, self.ranks = config, parts, checkpoints, ranks

    def collect(self, steps_done: int) -> dict[str, Any]:
        """The state after so many steps, copied to the CPU; complete on rank 0."""
        parts = {name: part.save(self.ranks) for name, part in self.parts.items()}
        return {"step": steps_done, "config": from_anywhere(self.config).as_dict(), **parts}

    def save(self, steps_done: int) -> None:
        """Begin to write a checkpoint.

        Raises:
            TrainingError: the run's directory was removed, and another process has begun a run there.
        """
        self.checkpoints.wait()  # so that no two copies are in memory
        state = self.collect(steps_done)
        if self.ranks.rank == 0:
            with suppress(OSError):  # writing the checkpoint says why
                keep_run(self.checkpoints.folder.parent, self.config)
            self.checkpoints.save(steps_done, state)

    def resume(self) -> int:
        """Load the newest checkpoint, if there is one; returns the number of steps done.

        Raises:
            ValueError: it is of another configuration or version, all are damaged, or ranks see others.
        """
        state = self._read_newest()
        if state is None:
            return 0
        where = str(self.checkpoints.folder)
        self.ranks.first(lambda: refuse_differences(self.config, state["config"], where))
        missing = self.parts.keys() - state.keys()
        if missing:
            raise ValueError(
                f"output: the checkpoints in {where} were written by another version of bincomm: they lack "
                f"{', '.join(sorted(missing))}; choose another --output, or resume with that version"
            )
        for name, part in self.parts.items():
            part.load(state[name], self.ranks)
        return state["step"]

    def _read_newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that rank 0 finds undamaged, on all ranks; None if there is none."""
        checkpoints, ranks = self.checkpoints, self.ranks
        state: dict[str, Any] | None = None

        def choose() -> int | None:
            nonlocal state
            state = checkpoints.load()
            return None if state is None else checkpoints.newest

        step, trouble = ranks.first(choose), ""
        if ranks.rank and step is not None:
            try:
                state = load_checkpoint(checkpoints.path(step))
            except (OSError, ValueError) as error:
                trouble = f"rank {ranks.rank} does not see the checkpoint that rank 0 resumes: {error}"
        troubles = [text for text in ranks.gather(trouble) if text]

        def raise_trouble() -> None:
            if troubles:
                raise ValueError(f"output: expected one folder that all ranks share; {troubles[0]}")

        ranks.first(raise_trouble)
        return state
