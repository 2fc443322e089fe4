"""The commands of `gift-trl`, one module each."""
