"""Public datasets, from their published formats to the one form that this project learns from."""
