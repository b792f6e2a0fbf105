"""What training costs: FLOPs, memory, time."""
