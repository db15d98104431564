"""MeanSparse for adversarially trained image classifiers (arXiv 2406.05927), from the command line."""

__version__ = "0.1.0"
