"""Generated images: drawn from a run, laid out as grids, and written to a folder with a manifest.

The samplers belong to the generators; scores of images are in `task.evaluation`.
"""
