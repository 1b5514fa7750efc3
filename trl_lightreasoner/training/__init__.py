"""`LightReasonerTrainer`: kept steps to an adapter.

In: a Dataset of kept steps and the expert. Out: an adapter, or all weights, with a model card. Knows neither the
amateur nor how the steps were found, apart from `dataset`, which has prompts sampled first if it is given an amateur.
"""
