"""The simulation study of Schuster's paper (section 4): `small` and `large` are its programs."""
