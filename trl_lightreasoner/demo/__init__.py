"""The bundled pair and its word problems.

Input: a seed. Output: any number of problems, two models small enough for a wheel, and a grader. Only the demo, the
examples and the studies use it.
"""
