"""Hypothesis strategies for records as any reader may make them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from finetune.schema import ImageInput, ImageTarget, Record, Turn

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
# File names of all kinds, those a reader might take for a size or a URL among them; no blank at the end.
name = st.one_of(
    st.sampled_from(
        ["a.jpg", "4x6", " 4 x 6", "data:x", "file:", "http:", " b.png", "~", "c#d.png", "中文.png", "..a"]
    ),
    st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/\\"), min_size=1, max_size=8).filter(
        lambda s: s.strip() == s.rstrip() == s and s not in (".", "..")
    ),
)
coordinate = st.floats(-2, 5000, allow_nan=False)
points = st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=6)
closed = points.map(lambda p: [*p, p[0]])
polygon = st.one_of(points, closed).map(tuple)
json_value: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def records(draw: st.DrawFn, root: str = "ROOT") -> Record:
    def path() -> str:
        folder = draw(st.sampled_from([root, f"{root}/images", f"{root}2", "/elsewhere", f"{root}/../x"]))
        return f"{folder}/{draw(name)}"

    def target() -> ImageTarget:
        kind = draw(st.sampled_from(["none", "path", "size"]))
        return ImageTarget(
            label=draw(st.sampled_from([0, 1, None])),
            mask_path=path() if kind == "path" else None,
            mask_size_hw=draw(st.tuples(st.integers(1, 9999), st.integers(1, 9999))) if kind == "size" else None,
            polygons=draw(st.none() | st.lists(polygon, max_size=3).map(tuple)),
            evidence=draw(st.none() | text),
        )

    def image() -> ImageInput:
        if draw(st.booleans()):
            return ImageInput(data=draw(st.binary(min_size=1, max_size=20)))
        return ImageInput(path=path())

    count = draw(st.integers(0, 3))
    roles = st.sampled_from(["system", "user", "assistant"])
    turns = draw(st.lists(st.builds(Turn, roles, text), min_size=int(count == 0), max_size=3))
    return Record(
        id=draw(text.filter(lambda s: s.strip())),
        images=tuple(image() for _ in range(count)),
        targets=tuple(target() for _ in range(count)),
        turns=tuple(turns),
        group=draw(text),
        provenance=draw(st.dictionaries(st.text(max_size=6), json_value, max_size=3)),
    )
