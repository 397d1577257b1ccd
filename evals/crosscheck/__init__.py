"""Our selections against those of kvpress, an independent implementation."""
