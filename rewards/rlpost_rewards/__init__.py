"""Rewards that ship with rlpost; the core finds them through the entry points `rlpost.rewards`."""
