"""Names of the tensors that algorithms send and keep beside the weights."""

# SCAFFOLD's control variates: the server's, and a client's own.
CONTROL, OWN_CONTROL = "control", "own-control"
# What local optimizers have gathered of what travels, and of what stays, see
# `train.optimizer_state`.
MOMENTS, OWN_MOMENTS = "moments", "own-moments"
# FedDyn's, of a client.
LINEAR_TERM = "linear-term"
