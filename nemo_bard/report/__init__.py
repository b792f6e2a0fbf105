"""Reports and pictures of runs and answers."""
