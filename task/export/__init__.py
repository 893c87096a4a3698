"""The final weights of a run in formats that the rest of the world loads.

`drawing`, `sample_*` and `diffusers_*` are shipped in the exports, beside the steps and the network
of `task.generators.diffusion`, with nothing changed but the imports among them; see `sources`.
"""
