"""The command line `feddm`: what is done with a run after its training, and with a node before it.

`main` lists the commands; one that needs more than a few lines has a module of its name.
`feddm-train` and `feddm-supervise` are in `server_app`.
"""
