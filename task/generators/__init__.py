"""Networks that are trained on images and draw images: one module or folder for each family.

How they are trained is in `task.training`, and how a finished run draws in `task.generation`.
"""
