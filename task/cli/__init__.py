"""The command line `feddm`: what is done with a run after its training."""
