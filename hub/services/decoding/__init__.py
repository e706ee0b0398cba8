"""Bytes of images to checked, preprocessed pixels."""
