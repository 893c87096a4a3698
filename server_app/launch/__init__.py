"""Starting a run: `feddm_train` is that command, and `job` carries one of its runs out.

Before it starts, `fit_to_images` chooses what is left open for own images and `plan` says what is
going to happen. A federated run is a `simulation` by `flwr run` on a private `superlink`.
What happens within a run is in `server_app` itself.
"""
