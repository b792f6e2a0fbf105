"""Mixtures: samples of the sources of a prepared folder, blended in a fixed order."""
