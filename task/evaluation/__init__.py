"""How good generated images are, beside real ones.

`metrics` lists every metric with its name, title and computation, over `features` of images, the
`distances` between them, the `noise_position`, the search for `near_copies` and a `classifier`.
`evaluate` computes them for the images of a run, `hospital_scores` against those of one hospital.
The files of evaluations are in `task.runs`; how they are shown is in `task.reporting`.
"""
