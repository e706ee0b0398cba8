"""Drawn images, from which a worker without images of its own learns what the inputs of a backbone's layers look like.

Half of them are smooth noise of several scales, half are overlapping shapes of many sizes ("dead leaves"), which have
edges and areas of one colour, as photographs do. In a ViT-S/14, weights rounded for both kinds changed the features of
real images less than weights rounded for one kind.
"""

import torch
from torch import Tensor, nn

PIXELS = 2**20  # in all probe images together: 4,096 patches of 16 by 16
FEWEST, MOST = 16, 128  # probe images
CELLS = (2, 4, 8, 16, 32)  # random cells along an image's side, smoothly joined
SHAPES = 40  # in an image, on average
SMALLEST, LARGEST = 0.03, 0.5  # half of a shape's side, of the image's side


def probe_images(input_size: tuple[int, int, int]) -> Tensor:
    """Return drawn images of (channels, height, width), float32 (n, C, H, W), normalised; always the same ones."""
    _, height, width = input_size
    count = min(MOST, max(FEWEST, PIXELS // (height * width)))
    generator = torch.Generator().manual_seed(0)
    noise = [_noise(CELLS[i % len(CELLS)], input_size, generator) for i in range(count // 2)]
    return torch.stack(noise + [_shapes(input_size, generator) for _ in range(count - len(noise))])


def _noise(cells: int, input_size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    channels, height, width = input_size
    values = torch.randn(1, channels, cells, cells, generator=generator)
    return nn.functional.interpolate(values, (height, width), mode="bicubic")[0]


def _shapes(input_size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Return ellipses and rectangles, each over the ones before; every third image is grey."""
    channels, height, width = input_size
    rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)[None, :]
    count = int(torch.randint(1, 2 * SHAPES, (), generator=generator))
    colours = torch.randn(1 + count, channels, generator=generator)
    if float(torch.rand((), generator=generator)) < 1 / 3:
        colours[:] = colours[:, :1]
    image = colours[0, :, None, None].repeat(1, height, width)
    places = torch.rand(count, 2, generator=generator)
    sides = SMALLEST * (LARGEST / SMALLEST) ** torch.rand(count, 2, generator=generator)  # many small ones, few large
    for i, ((y, x), (half_height, half_width)) in enumerate(zip(places, sides, strict=True)):
        down, across = (rows - y).abs() / half_height, (columns - x).abs() / half_width
        inside = down**2 + across**2 < 1 if i % 2 else torch.maximum(down, across) < 1
        image = torch.where(inside, colours[1 + i, :, None, None], image)
    return image + 0.1 * torch.randn(image.shape, generator=generator)
