"""The ServerApp: rounds, sampling of clients, aggregation, checkpoints, global evaluation."""
