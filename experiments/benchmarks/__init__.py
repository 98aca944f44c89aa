"""Programs that print a ratio to a peer measured in the same run."""
