"""The ServerApp of Flower: what happens within a run.

- `rounds`: the loop over rounds, with retries, checkpoints and evaluation; `federated` and
  `centralized` say how a round trains.
- `nodes`: which node is which client, and the sampling of clients. `messages`, `exchange` and
  `replies`: what is sent, the wait for what comes back, and the checks of it.
- `strategies`: aggregation, from the replies of a round to the next weights; `weighting`: how much
  each client counts.
- `evaluation`, `hospital_scores`: what is drawn and measured. `dataset`: images that are all on
  this machine.

Starting a run is in `launch`, restarting one in `supervisor`, local training in `task.training`.
"""
