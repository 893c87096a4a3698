"""The final weights of a run in formats that the rest of the world loads.

`drawing`, `sample_*` and `diffusers_*` are shipped in the exports, beside `task.steps` and
`task.network`, with nothing changed but the imports among them; see `task.export.sources`.
"""
