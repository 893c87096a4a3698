"""What a hospital gives away of its patients, and how much of it: differential privacy's accounts.

Training with it is in `task.training.private`.
"""
