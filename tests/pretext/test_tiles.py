"""What the tasks share: cutting, colours and normalisation, against slow implementations."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ktransfer.pretext import tiles
from ktransfer.pretext.tiles import GREY, PLAIN, PROJECTED


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(0, 20), st.integers(1, 4), st.integers(0, 99))
def test_gather_cuts_every_channel_at_its_own_corner(tile, rest, slots, seed):
    random = np.random.default_rng(seed)
    size = tile + rest
    pixels = random.integers(0, 256, (3, 3, size, size), np.uint8)
    image = random.integers(0, 3, (5, slots))
    corner = random.integers(0, rest + 1, (5, slots, 3, 2))
    found = tiles.gather(*(torch.from_numpy(part) for part in (pixels, image, corner)), tile)
    assert found.dtype == torch.uint8 and found.shape == (5, slots, 3, tile, tile)
    for example, slot, channel in np.ndindex(5, slots, 3):
        y, x = corner[example, slot, channel]
        expected = pixels[image[example, slot], channel, y : y + tile, x : x + tile]
        assert np.array_equal(found[example, slot, channel].numpy(), expected)


def test_the_projection_is_the_released_matrix_and_grey_is_the_mean():
    corners = torch.eye(3).mul(255).byte().view(1, 3, 3, 1, 1)
    kinds = {kind: tiles.recolour(corners, torch.full((1, 3), kind)).view(3, 3).T / 6 / 255 for kind in range(3)}
    released = torch.tensor([[0.8333, 0.3333, -0.1667], [0.3333, 0.3333, 0.3333], [-0.1667, 0.3333, 0.8333]])
    torch.testing.assert_close(kinds[PROJECTED], released, atol=1e-4, rtol=0)
    torch.testing.assert_close(kinds[GREY], torch.full((3, 3), 1 / 3))
    torch.testing.assert_close(kinds[PLAIN], torch.eye(3))


def test_dropping_keeps_one_channel_less_its_mean_and_noise_in_the_others():
    pixels = torch.randint(0, 256, (4, 2, 3, 7, 7), generator=torch.Generator().manual_seed(0)).byte()
    noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    kept = torch.tensor([[0, 1], [2, 0], [1, 1], [2, 2]])
    found = tiles.drop_colours(pixels, kept, noise)
    for example, patch, channel in np.ndindex(4, 2, 3):
        values = pixels[example, patch, channel].double().numpy()
        expected = values - values.mean() if channel == kept[example, patch] else noise[example, patch, channel].numpy()
        np.testing.assert_allclose(found[example, patch, channel].numpy(), 6 * expected, atol=1e-3)


def test_normalising_is_by_tile_over_all_channels():
    values = torch.randn(3, 2, 3, 9, 9, generator=torch.Generator().manual_seed(0)) * 40 + 7
    found = tiles.normalise(values).double().flatten(2)
    torch.testing.assert_close(found.mean(dim=2), torch.zeros(3, 2).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std(dim=2, correction=0), torch.ones(3, 2).double(), atol=1e-3, rtol=0)
    assert tiles.normalise(torch.full((1, 1, 3, 5, 5), 123.0)).abs().max() < 1e-3
