"""Whether an answer is right.

In: text of a completion and reference answers. Out: a verdict, within a limit of time. Knows neither models nor
datasets.
"""
