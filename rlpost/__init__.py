"""rlpost: reinforcement-learning post-training of small models, as a service on Ray."""

__version__ = "0.1.0"
