"""The training loop, on one device or by several processes, and how torch is set up for it.

Losses belong to the generators; rounds and aggregation to `server_app`.
"""
