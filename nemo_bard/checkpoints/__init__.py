"""Checkpoint folders: reading, converting, merging, making tiny ones."""
