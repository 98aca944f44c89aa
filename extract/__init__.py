"""Foundation models to arrays (PyTorch). Talks to the other packages through files only."""
