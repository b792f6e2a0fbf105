"""Limits that both servers have, and the words in which vLLM is told of them."""

MAX_PIXELS = 16_777_216
"""Of a picture with vLLM, of all pictures of a request with the local server."""
PIXELS_VARIABLE = "VLLM_MAX_IMAGE_PIXELS"
NOWHERE, PUBLIC = "none.invalid", "*"
"""Instead of names in ``--allowed-media-domains``: nothing is fetched; whatever has a public address is."""
