"""Kinds of input: one folder each."""
