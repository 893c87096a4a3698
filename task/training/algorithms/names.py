"""Names of the tensors that algorithms send and keep beside the weights."""

# SCAFFOLD's control variates: the server's, and a client's own.
CONTROL, OWN_CONTROL = "control", "own-control"
# What local optimizers have gathered, see `train.optimizer_state`.
MOMENTS = "moments"
# FedDyn's, of a client.
LINEAR_TERM = "linear-term"
