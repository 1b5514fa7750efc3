"""One or two Datasets of kept steps as an HTML page.

Input: Datasets of kept steps, and logs of trainings. Output: one HTML page that needs no network, and PNG files.
"""
