"""Target distributions that outlive a call: what a teacher said, and statistics of human writing, kept on disk."""
