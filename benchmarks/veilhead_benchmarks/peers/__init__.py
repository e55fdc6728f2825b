"""Other ways to evaluate the same head on an encrypted embedding."""
