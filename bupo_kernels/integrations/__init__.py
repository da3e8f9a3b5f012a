"""This library inside other people's trainers: one module for each peer, imported by name, since only it imports the peer."""
