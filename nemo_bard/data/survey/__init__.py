"""What a data set is like, in numbers: its sources, how long its samples are, what a limit leaves out (``nemo-bard data show``)."""
