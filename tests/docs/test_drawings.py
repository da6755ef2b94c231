"""The drawings in docs/pictures are those that docs/make_drawings.py draws."""

import pytest

from docs.make_drawings import DRAWINGS, FOLDER, Drawing, render


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawing_is_current(name: str) -> None:
    assert (FOLDER / f"{name}.svg").read_text(encoding="utf-8") == render(DRAWINGS[name])


@pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=lambda drawing: drawing.title)
def test_boxes_lie_inside_the_picture_and_do_not_overlap(drawing: Drawing) -> None:
    boxes = [box for box in drawing.boxes.values() if box.kind != "group"]
    for number, box in enumerate(boxes):
        assert box.x + box.width <= drawing.width
        assert box.y + box.height <= drawing.height
        for other in boxes[:number]:
            beside = box.x >= other.x + other.width or other.x >= box.x + box.width
            assert beside or box.y >= other.y + other.height or other.y >= box.y + box.height
