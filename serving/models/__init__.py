"""Models that are derived once from Python wheels and kept on disk."""
