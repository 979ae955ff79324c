"""The APIs for embeddings, scores and ranked documents."""
