"""Answers and scores of a checkpoint."""
