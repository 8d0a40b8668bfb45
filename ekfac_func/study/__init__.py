"""The command `python -m ekfac_func study`: exact against approximate second moments of a network on real data."""
