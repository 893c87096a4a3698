"""Which hospital a node is: `registry` keeps it on the disk, `command` is `feddm-hospitals`.

Flower gives a key another node id where its database was lost or replaced. The coordinator's file
outlives that, so that a hospital keeps its client number, and its name.
"""
