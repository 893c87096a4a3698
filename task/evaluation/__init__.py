"""How good generated images are, beside real ones.

`metrics` lists every metric with its name, title and computation, `evaluate` computes them for the
images of a run (`features` of images, `distances` between them, `noise_position`, the search for
`near_copies`, a `classifier`), `hospital_scores` against the images of one hospital. The files of evaluations are
in `task.runs`; how they are shown is in `task.reporting`.
"""
