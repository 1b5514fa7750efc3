"""All stages in one process: from a pair and a dataset to a verdict.

In: an expert, an amateur and a dataset, by name. Out: steps, an adapter, answers, a report and whether to keep the
adapter, each where the single command would leave it; of a search, the best setting of the training as well. What a
stage does is the stage's own business.
"""
