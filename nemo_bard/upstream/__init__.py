"""What nemo_bard needs of NeMo AutoModel, transformers and torch beyond their public interfaces."""
