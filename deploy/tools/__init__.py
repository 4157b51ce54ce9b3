"""What writes and checks the files in deploy/."""
