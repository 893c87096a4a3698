"""The folder of a run: what is written to it and read from it, checkpoints and weights.

Pages and tables that are made from it are in `task.reporting`.
"""
