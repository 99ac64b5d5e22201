"""What a training loop needs around the step: schedules, optimiser, checkpoints, logs."""
