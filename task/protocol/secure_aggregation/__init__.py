"""Sums of what clients send, of which the server learns nothing else.

`keys`: who a hospital is. `fixed_point`: updates as integers. `masks` and `shamir`: what hides
them, and how it comes off again. `terms`: what all clients of a sum must agree on. `participant`
and `memory`: the client's half, and what it remembers; `coordinator`: the server's half.

Source: Bonawitz et al. 2017 (CCS), with one upload and one unmasking exchange for each sum.
"""
