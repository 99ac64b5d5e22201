"""What a training loop needs around the step: schedules, optimizer, checkpoints, logs."""
