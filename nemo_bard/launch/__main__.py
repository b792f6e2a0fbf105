"""``python -m nemo_bard.launch``: torchrun with the exit codes of ``launch.exits``; what a Slurm job runs on every node."""

import os
import sys

from nemo_bard.launch.torchrun import node_options, supervise

sys.exit(supervise([*node_options(os.environ), *sys.argv[1:]], resumable=True))
