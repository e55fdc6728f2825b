"""What both sides must agree on, byte for byte."""
