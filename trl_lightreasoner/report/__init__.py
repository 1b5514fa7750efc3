"""A Dataset of kept steps, or several, as a page to look at.

In: Datasets of kept steps, and logs of trainings. Out: one HTML page that needs no network, and PNG files. Changes
nothing that it reads.
"""
