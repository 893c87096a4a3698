"""What a hospital's node starts in place of Flower's `flwr-clientapp`.

It imports nothing of feddm: the bundle that it loads brings feddm along, in a version of its own.
"""
