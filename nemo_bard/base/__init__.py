"""What every other package may use: files, paths, errors, names; the standard library only."""
