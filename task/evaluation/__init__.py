"""How good images are: features, metrics, the search for copies, restoration of known images.

How the figures are shown is in `task.reporting`.
"""
