"""Privacy: noise on what a server learns, with an account of it, and masks under which it sees sums alone."""
