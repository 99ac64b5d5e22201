"""Images in, batches of augmented crops out."""
