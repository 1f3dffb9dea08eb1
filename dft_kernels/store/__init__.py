"""The teacher store: what a teacher said about fixed texts, kept on disk."""
