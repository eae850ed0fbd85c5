"""Attacks: how to search inside a threat model."""
