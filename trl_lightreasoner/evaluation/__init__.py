"""Benchmarks, answered and graded.

Input: a model, optionally a baseline, and problems. Output: accuracies with their standard errors, compared problem by
problem.
"""
