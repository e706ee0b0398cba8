"""Errors about images and datasets. Each message names the file, the value or limit, and the remedy."""


class ImageError(ValueError):
    """Bytes that cannot be decoded as an image."""


class ImageTooLargeError(ImageError):
    """An image whose header declares more pixels than the limit. It is not decoded."""


class DataError(ValueError):
    """A dataset, checkpoint or output path that cannot be used."""
