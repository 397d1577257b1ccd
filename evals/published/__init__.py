"""LongBench (arXiv 2308.14508) and RULER (2404.06654), from a folder that the user has."""
