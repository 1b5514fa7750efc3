"""Greedy completions.

In: an expert and token ids of prompts. Out: token ids of completions, the same by whichever way is fastest. Knows
neither the amateur nor what the completions are for.
"""
