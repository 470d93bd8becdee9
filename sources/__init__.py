"""Where poses come from, and how they lie on disk."""
