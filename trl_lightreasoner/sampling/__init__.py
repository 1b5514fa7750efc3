"""`ContrastiveStepSampler`: prompts to kept steps.

Input: prompts, an expert and an amateur. Output: a Dataset of kept steps with their labels v_C.
"""
