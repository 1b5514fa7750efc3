"""What is shared, and its cards.

Input: a Dataset of steps, a trainer, accuracies. Output: cards and repositories on the Hub, without paths of the
machine. The trainer is known only as a `transformers.Trainer`.
"""
