"""The Dataset of kept steps: what goes in, how it lies on the disk, what comes out.

In: rows of prompts, and columns for them. Out: token ids, a Dataset that survives a kill, rows that training can rely
on. Knows neither a loaded model nor how a step is found.
"""
