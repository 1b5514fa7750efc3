"""`LightReasonerTrainer`: kept steps to an adapter.

Input: a Dataset of kept steps and the expert. Output: an adapter, or all weights, with a model card. Only `dataset`
knows the amateur: it samples prompts first if one is given.
"""
