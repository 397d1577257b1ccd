"""Answer quality under compression, measured in the engine."""
