"""What a model remembers of the images it was trained on: copies, and members that can be told."""
