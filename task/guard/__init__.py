"""A hospital's guard: which bundles of code its node runs, on what conditions, and the log of it.

What Flower starts in place of its own `flwr-clientapp` is in `node_guard`.
"""
