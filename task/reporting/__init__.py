"""Pages and tables from finished or running runs.

`report` (its `charts`, `warning_signs`, `run_summary`, `comparability` of several runs), the
paper's `tables` (their `figures`, `heat_maps` and the `published` values), `generator_tables` and
`generator_figure` of sweeps over generators, `remedy_tables` and `remedy_figure` of sweeps over
remedies, and `model_card` prepare data; `rendering` fills the templates in `templates/`, where
every sentence and tag of a page stands.
What is measured, and how, is in `task.evaluation`.
"""
