"""What server and clients share; it imports neither of them, nor Flower.

From below to above: `checks`, `config`, `data` and `generators`, `training`, `protocol`,
`generation`, `runs`, `evaluation`, `reporting` and `export`, `cli`; none imports one that stands
above it. The modules beside the packages (files, locks, processes, progress, randomness) serve all.
"""
