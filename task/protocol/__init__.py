"""What both ends of the network agree on.

`wire`: the names in messages, and how weights are packed. `node`: the configuration of a node.
It knows nothing of Flower: server_app and client_app put it into Flower's messages.
"""
