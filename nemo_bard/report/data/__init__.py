"""A survey of a data set as text, as a picture and as a page."""
