"""Names of the tensors that algorithms send and keep beside the weights."""

# SCAFFOLD's control variates: the server's, and a client's own.
CONTROL, OWN_CONTROL = "control", "own-control"
# FedDyn's, of a client.
LINEAR_TERM = "linear-term"
