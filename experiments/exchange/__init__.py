"""What workers exchange in a training step."""
