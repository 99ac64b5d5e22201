"""Smaller crops in the first part of a run, which take less time, and crops of full size at the end."""

from bincomm.config import PretrainConfig


class Resolution:
    """The sides of the crops of a run's steps, a plain function of the step.

    A step's cost is counted in pixels that pass through a network, of an image: forward they count once,
    backward twice. The student passes all crops forward and backward, and forward once more where batches
    are accumulated in parts; the teacher passes the global ones forward. That is nearly the computation of a
    network on large crops: of a ViT-B/16 whose crops are halved, 25.6 % in place of 25 % of the operations
    are left. On small crops what does not depend on them, such as the head, counts as well.

    Args:
        steps: of the run.
    """

    def __init__(self, config: PretrainConfig, steps: int):
        self.config, self.steps = config, steps
        self.low_steps = int(config.low_resolution * steps)
        self.full = config.global_size, config.local_size
        self.low = config.low_sizes if self.low_steps else self.full

    def __call__(self, step: int) -> tuple[int, int]:
        """Sides of the global and the local crops of a step, which counts from 0, in pixels."""
        return self.low if step < self.low_steps else self.full

    def cost(self, step: int) -> int:
        """Pixels that pass through a network in a step, of an image."""
        global_size, local_size = self(step)
        student = 3 if self.config.accumulate == 1 else 4
        return (student + 1) * 2 * global_size**2 + student * self.config.local_crops * local_size**2

    def work(self, step: int) -> int:
        """The costs of this step and of all after it together."""
        low = max(self.low_steps - step, 0)
        return low * self.cost(0) + (self.steps - step - low) * self.cost(self.steps - 1)

    def describe(self) -> str:
        """What low resolution is and saves, in words; there must be steps of it."""
        low, full = self.pixels(self.low), self.pixels(self.full)
        saved = 1 - self.work(0) / (self.steps * self.cost(self.steps - 1))
        return (
            f"low resolution: crops of {self.sides(self.low)} pixels in the first {self.low_steps} of "
            f"{self.steps} steps, then of {self.sides(self.full)}: {low:,}, then {full:,} pixels an image; "
            f"of what passes through the networks, forward and backward, {saved:.0%} is saved"
        )

    def pixels(self, sides: tuple[int, int]) -> int:
        """Of all crops of an image."""
        return 2 * sides[0] ** 2 + self.config.local_crops * sides[1] ** 2

    def sides(self, sides: tuple[int, int]) -> str:
        """In words."""
        return f"{sides[0]} and {sides[1]}" if self.config.local_crops else f"{sides[0]}"
