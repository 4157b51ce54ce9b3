"""The demo: embedded servers, an upstream, the service as a process, a subscriber, and a proof at the end."""
