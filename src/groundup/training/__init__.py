"""The one loop, its state, its checkpoints, its optimizers and schedules, and what watches it."""
