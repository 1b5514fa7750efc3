"""The bundled pair and its word problems.

In: a seed. Out: problems without end, two models small enough for a wheel, and a grader for them. Nothing but the
demo, the examples and the studies knows it.
"""
