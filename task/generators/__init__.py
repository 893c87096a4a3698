"""Generators: models that are trained on images and draw images, one module or folder per family.

`base` is the contract that every family keeps, `registry` finds a family by its name in
`model.family`, `noise` is what every image is drawn from. How generators are trained is in
`task.training`, and how a finished run draws in `task.generation`.
"""
