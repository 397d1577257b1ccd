"""One client's view of answers: streams, times, records."""
