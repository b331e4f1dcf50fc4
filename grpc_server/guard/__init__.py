"""Detection of text that must not be followed, learned or kept: rules as data, and what matches them."""
