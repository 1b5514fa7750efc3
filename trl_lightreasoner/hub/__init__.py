"""What is shared, and its cards.

In: a Dataset of steps, a trainer, accuracies. Out: cards, and what is on the Hub, without a path of the machine. Knows
the trainer as a `transformers.Trainer` only.
"""
