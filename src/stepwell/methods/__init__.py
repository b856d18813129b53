"""Training methods: one published method, one file, one factory."""
