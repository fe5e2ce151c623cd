"""What the folder reader must know of a data set: where its images and masks are and how their names belong together.

`LAYOUTS` holds the public sets as they are distributed; data/README.md says for each what was checked. A layout is text
only: the matching is in folder.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Role:
    """Images of one kind.

    Args:
        dirs: folders below the data set's, searched with all their sub-folders; `A|B` means whichever of them exists.
            A folder that is listed itself is not searched as a part of one above it.
        name: regular expression that the file name without suffix matches whole; its groups may stand in templates.
        groups: templates of what the image shares with others; images with any one in common make a group.
    """

    dirs: tuple[str, ...] = ()
    name: str = ".+"
    groups: tuple[str, ...] = ("{stem}",)


@dataclass(frozen=True)
class Layout:
    """A data set in folders.

    Args:
        masks: their folders and names; without folders tampered images have no masks.
        mask_name: template of a mask's name without suffix, from the tampered image's `{stem}`, `{parent}` (name of its
            folder) and the groups of its `name`.
        ignore: regular expression over the path below the data set, without suffix, of images that are not used.
        is_mask_shared: whether several images may have one mask (post-processed variants).
        mask_convention, mask_pixels: as the options of these names.
        preset: key of `LAYOUTS` it comes from, "" where the options describe it all.
    """

    authentic: Role = Role(("authentic",))
    tampered: Role = Role(("tampered",))
    masks: Role = Role(("masks",))
    mask_name: str = "{stem}"
    ignore: str = ""
    is_mask_shared: bool = False
    mask_convention: str = ""
    mask_pixels: str = "bright"
    preset: str = ""


_POST_PROCESSED = r"(?:_[A-Z]{2}[0-9]+)?"

LAYOUTS: dict[str, Layout] = {
    "generic": Layout(),
    "casia1": Layout(
        authentic=Role(
            ("CASIA 1.0 dataset/Au|Au",),
            r"Au_(?P<kind>[a-z]+)_(?P<number>[0-9]+)",
            ("casia1/{kind}{number}",),
        ),
        tampered=Role(
            ("CASIA 1.0 dataset/Modified Tp|CASIA 1.0 dataset/Tp|Modified Tp|Tp",),
            r"Sp_.+_(?P<first>[a-z]+[0-9]+)_(?P<second>[a-z]+[0-9]+)_[0-9]+",
            ("casia1/{first}", "casia1/{second}"),
        ),
        masks=Role(("CASIA 1.0 groundtruth",), ".+_gt"),
        mask_name="{stem}_gt",
        mask_convention="target",
    ),
    "casia2": Layout(
        authentic=Role(("Au",), r"Au_(?P<kind>[a-z]+)_(?P<number>[0-9]+)", ("casia2/{kind}{number}",)),
        tampered=Role(
            ("Tp",),
            r"Tp_.+_(?P<first>[a-z]+[0-9]+)_(?P<second>[a-z]+[0-9]+)_[0-9]+",
            ("casia2/{first}", "casia2/{second}"),
        ),
        masks=Role(("CASIA 2 Groundtruth|Gt|GT",), "Tp_.+"),
        mask_name="{stem}_gt",
        mask_convention="target",
    ),
    "coverage": Layout(
        authentic=Role(("image",), "(?P<number>[0-9]+)", ("coverage/{number}",)),
        tampered=Role(("image",), "(?P<number>[0-9]+)t", ("coverage/{number}",)),
        masks=Role(("mask",), "[0-9]+forged"),
        mask_name="{number}forged",
        ignore=r"mask/(?:.*/)?[0-9]+(?:copy|paste)",
        mask_convention="target",
    ),
    "columbia": Layout(
        authentic=Role(("4cam_auth",), ".+", ("columbia",)),
        tampered=Role(("4cam_splc",), ".+", ("columbia",)),
        masks=Role(("4cam_splc/edgemask|4cam_splc/4cam_splc/edgemask",), ".+_edgemask"),
        mask_name="{stem}_edgemask",
        ignore=r"4cam_auth/(?:.*/)?edgemask/.+|.+_edgemask_3",
        mask_convention="target",
        mask_pixels="green",
    ),
    "comofod": Layout(
        authentic=Role((".",), rf"(?P<number>[0-9]+)_O{_POST_PROCESSED}", ("comofod/{number}",)),
        tampered=Role((".",), rf"(?P<number>[0-9]+)_F{_POST_PROCESSED}", ("comofod/{number}",)),
        masks=Role((".",), "[0-9]+_B"),
        mask_name="{number}_B",
        ignore=r"(?:.*/)?[0-9]+_M",
        is_mask_shared=True,
        mask_convention="source_and_target",
    ),
    "imd2020": Layout(
        authentic=Role((".",), ".+_orig", ("imd2020/{parent}",)),
        tampered=Role((".",), r"(?!.+_(?:orig|mask)$).+", ("imd2020/{parent}",)),
        masks=Role((".",), ".+_mask"),
        mask_name="{stem}_mask",
        mask_convention="target",
    ),
}
