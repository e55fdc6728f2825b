"""The service: a private head, evaluated on ciphertexts that it cannot read."""
