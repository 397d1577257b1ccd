"""The workers' processes: scoring, selecting and copying around a model's forward pass."""
