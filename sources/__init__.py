"""Where poses come from, and how they lie on disk. Nothing here imports a script at the top."""
