"""Rewards that ship with rlpost; the core finds them through the entry-point group `rlpost.rewards`."""
