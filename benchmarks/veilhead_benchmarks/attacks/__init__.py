"""Attacks: what a head, its answers, an embedding and a query give away, measured."""
