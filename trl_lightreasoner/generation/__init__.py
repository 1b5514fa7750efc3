"""Greedy completions.

Input: an expert and token ids of prompts. Output: token ids of completions, the same for every generation method.
Must not depend on the amateur, nor on what the completions are for.
"""
