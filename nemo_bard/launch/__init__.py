"""Starting worker processes, here and through Slurm."""
