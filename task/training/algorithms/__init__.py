"""The clients' halves of the federated algorithms, one file each, and which one a run trains by.

The servers' halves are in `server_app`. Nothing here knows of messages or of files: what a client
sends or keeps are tensors by name.
"""
