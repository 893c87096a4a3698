"""The diffusion model of the paper: network, noise schedule, loss and samplers."""
