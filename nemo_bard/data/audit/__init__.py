"""Finding what is wrong with a data set, all of it, with file and row (``nemo-bard data check``)."""
