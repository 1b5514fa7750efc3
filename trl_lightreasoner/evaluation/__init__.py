"""Benchmarks, answered and graded.

In: a model, perhaps a baseline, and problems. Out: accuracies with their errors, compared problem by problem. Knows
nothing of steps or of training.
"""
