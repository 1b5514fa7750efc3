"""The Dataset of kept steps: its input, its files and its rows for training.

Input: rows of prompts, and the columns computed for them. Output: token ids, a Dataset that survives an interruption,
and checked rows for training. Must not depend on a loaded model, nor on how steps are found.
"""
