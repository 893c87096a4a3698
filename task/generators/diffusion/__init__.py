"""The diffusion model of the paper.

`generator` joins a `network`, the `objective` (forward process and loss, over a `noise_schedule`)
and the `samplers`; `repaint` draws images of which a part is known.
"""
