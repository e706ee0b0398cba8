"""Export and import of a tenant as a tar."""
