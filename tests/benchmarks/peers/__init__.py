"""Consumers that other teams would write for the same job; each names where its way of writing comes from."""
