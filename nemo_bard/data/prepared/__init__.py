"""Prepared folders: samples of several sources in Arrow files, checked once (``nemo-bard data prepare``)."""
