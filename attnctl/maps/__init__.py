"""Attention maps of words: recorded, read, shown."""
