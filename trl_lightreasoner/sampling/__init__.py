"""`ContrastiveStepSampler`: prompts to kept steps.

In: prompts, an expert, an amateur. Out: a Dataset of kept steps with their labels v_C. Knows nothing of training.
"""
