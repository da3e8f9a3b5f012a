"""This library inside other people's trainers: one module a peer, which imports it; this package imports none of them."""
