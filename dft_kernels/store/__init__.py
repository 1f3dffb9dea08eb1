"""The teacher store: a teacher's distributions over fixed texts, on disk."""
