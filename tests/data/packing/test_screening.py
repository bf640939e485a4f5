"""Which images can be packed: the verdict of the slow decoder, whatever is damaged."""

import io
import random
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from data.images.decode import DecodeError, decode
from data.images.held_out_hashes import held_out_row
from data.packing.screening import check_image


def jpeg(generator: random.Random) -> bytes:
    """A JPEG of any shape and layout."""
    height, width = generator.randint(1, 200), generator.randint(1, 200)
    blocks = np.frombuffer(generator.randbytes((height // 8 + 1) * (width // 8 + 1) * 3), np.uint8)
    image = Image.fromarray(blocks.reshape(height // 8 + 1, width // 8 + 1, 3)).resize((width, height))
    buffer = io.BytesIO()
    image.convert(generator.choice(["RGB", "RGB", "L"])).save(
        buffer,
        "JPEG",
        quality=generator.choice([30, 75, 95]),
        progressive=generator.random() < 0.4,
        restart_marker_blocks=generator.choice([0, 4]),
    )
    return buffer.getvalue()


def damaged(content: bytes, generator: random.Random) -> bytes:
    """The same file cut short, longer, or with other bytes in some places."""
    if generator.random() < 0.25:
        return content[: generator.randint(2, len(content))]
    if generator.random() < 0.1:
        return content + bytes(generator.randint(0, 50))
    changed = bytearray(content)
    for _ in range(generator.choice([1, 1, 2, 5, 30])):
        place = generator.randrange(len(changed))
        changed[place : place + generator.randint(0, 4)] = generator.randbytes(generator.randint(0, 2))
    return bytes(changed)


def problem(check: Callable[[bytes], object], content: bytes) -> str:
    try:
        check(content)
    except DecodeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("seed", range(20))
def test_an_image_is_rejected_when_the_slow_decoder_refuses_it_and_for_the_same_reason(seed: int) -> None:
    generator = random.Random(seed)
    whole = jpeg(generator)
    assert not problem(decode, whole)
    found = []
    for content in (damaged(whole, generator) for _ in range(30)):
        found.append(problem(decode, content))
        assert problem(lambda content: check_image(content, is_labeled=False), content) == found[-1]
        assert problem(lambda content: check_image(content, is_labeled=True), content) == found[-1]
    assert any(found)


def test_only_labeled_images_are_hashed() -> None:
    content = jpeg(random.Random(0))
    assert check_image(content, is_labeled=False) is None
    assert check_image(content, is_labeled=True) == held_out_row(decode(content))
