"""Accuracies with error bars, paired differences, and the verdict by a stated rule. Read ``paired`` first."""
