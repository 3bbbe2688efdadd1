"""What a training will need before it is begun: memory by owner, time, disk."""
