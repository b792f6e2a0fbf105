"""``python -m nemo_bard.launch``: torchrun with the exit codes of ``launch.exits``; what a Slurm job runs on every node."""

import sys

from nemo_bard.launch.torchrun import supervise

sys.exit(supervise(sys.argv[1:], resumable=True))
