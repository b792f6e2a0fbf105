"""``export``: any training checkpoint becomes a Hugging Face folder.

``places`` finds the checkpoint in what the user names, ``weights`` reads its tensors one by one, ``writing`` writes them in shards,
``facts`` reads what the run knows of itself, ``card`` tells it, ``export`` puts all of it into one folder.
"""
