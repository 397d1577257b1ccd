"""The worker processes: they score, select and copy entries around a model's forward pass."""
