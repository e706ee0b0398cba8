"""The recipe of the KARST paper: epochs, warm-up and a cosine, for reproduction (docs/method.md)."""
