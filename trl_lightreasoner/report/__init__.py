"""A Dataset of kept steps, or several, as a page to look at.

Input: Datasets of kept steps, and logs of trainings. Output: one HTML page that needs no network, and PNG files.
"""
