"""What `make bench` measures; see performance.md."""
