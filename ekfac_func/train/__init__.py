"""The command `python -m ekfac_func train`: EKFAC beside SGD with momentum and AdamW on real images."""
