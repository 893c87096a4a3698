"""Starting a run: `feddm-train`, the plan for own images, and the SuperLink of a simulation.

`command` is `feddm-train`, `submit` hands a run to a SuperLink and `follow` watches it.
What happens within a run is in `server_app` itself.
"""
