"""One absl program a study; each module's docstring has its command."""
