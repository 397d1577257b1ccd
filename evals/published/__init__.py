"""LongBench (arXiv 2308.14508) and RULER (2404.06654), read from a folder of the user."""
