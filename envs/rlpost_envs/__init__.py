"""Environments that ship with rlpost; the core finds them by the entry-point group
`rlpost.envs`."""
