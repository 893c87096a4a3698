"""How a generator is trained on the images of one client, or on the pooled ones.

`loop` is the training and the held-out loss, `distributed` lets several processes train together,
`devices` sets torch up, `precision` times float32 against bfloat16. Losses belong to the
generators; rounds and aggregation to `server_app`.
"""
