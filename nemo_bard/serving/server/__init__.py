"""A small server for one user: OpenAI's chat completions over one model and one decoding thread, and a web page."""
