"""Side by side with every peer: what is timed, how, and what is written down."""
