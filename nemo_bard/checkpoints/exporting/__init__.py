"""``export``: any training checkpoint becomes a Hugging Face folder.

``places`` finds the checkpoint in what the user names, ``origin`` opens it, ``weights`` reads its tensors one by one, ``writing``
writes them in shards. ``facts`` (with ``data_facts`` and ``base_model``) reads what the run knows of itself, ``card`` (with
``usage``) tells it, ``older`` adds what transformers 4.57 reads; ``export`` puts all of it into one folder.
"""
