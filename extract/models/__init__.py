"""Readers of foundation models, one file each, behind the protocol of `base`."""
