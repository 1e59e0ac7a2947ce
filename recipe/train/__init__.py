"""Training: rows become packed token sequences, the launcher starts the ranks, the trainer runs inside each of them."""
