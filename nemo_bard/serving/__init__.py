"""Serving: what a request may ask, the plugin of vLLM, and a local server for one user."""
