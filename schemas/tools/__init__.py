"""What writes and checks the documents beside the models; for this repository only, not part of the wheel."""
