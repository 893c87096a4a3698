"""The ClientApp of Flower: what a hospital does with each message of the server.

`app` answers messages, from a `workspace` that a process builds once; `failures` keeps the text of
errors on the node, `local_model` keeps its own weights there, `hospital_scores` scores images that
the server drew. Training itself is in `task.training`, a node's configuration in `task.protocol`.
"""
