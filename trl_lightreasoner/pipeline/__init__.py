"""All stages in one process: from a pair and a dataset to a verdict.

Input: the names of an expert, an amateur and a dataset. Output: steps, an adapter, answers, a report and a verdict on
the adapter, each in the folder of its single command. A search also gives the best training setting.
"""
