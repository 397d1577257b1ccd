"""Recorded results, and the code that scores, shows and stores them."""
