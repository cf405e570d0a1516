"""Short scripts for people who arrive: one thing each."""
