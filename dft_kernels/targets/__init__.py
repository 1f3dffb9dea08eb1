"""Target distributions that outlive a call: what a teacher said, kept on disk."""
