"""What server and clients share, and what knows nothing of federation."""
