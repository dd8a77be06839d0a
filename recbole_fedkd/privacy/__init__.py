"""Privacy: noise on what a server learns, with an account of it."""
