"""Samples in a tar: member names, keys, image and label members. The only module that knows them.

WebDataset's convention: consecutive members with the same name up to the first dot of the base name, the key, are one sample; the rest
is the field. A sample's identity is (shard, ordinal); its key need not be unique.

A sample's image is the member whose field is only an image extension (`N.jpg` beside `N.depth.png`; of several, the first in
`IMAGE_EXTENSIONS`). Without one, a single other image (`N.v2.jpg`) is the sample's. Of several others none is: the dot belongs to their
names (`2024.05.01.jpg`), and each becomes a row with a problem. So every image member is a row or in `Sample.ignored`.

The videos of a sample that has no image count as its images do; beside an image they are further members, like a depth map in .npy.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from .tar_reader import DamagedTarError, Member, read_members

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "avi", "mov")
_EXTENSIONS = IMAGE_EXTENSIONS + VIDEO_EXTENSIONS
LABEL_FIELD = "cls"
INDEX_RULE = "2"
"""Version of the rule by which members become samples. 1, never recorded: a sample's image was its first image member."""
MAX_IMAGE_BYTES = 256 * 1024 * 1024
"""Larger image members are refused without reading them: the largest image that may be decoded has 192 MiB of pixels."""
_OTHER_NAMES = {"jpe": "jpg", "jfif": "jpg"}  # of the same format
_WRITABLE_KEY = re.compile(r"[A-Za-z0-9_-]{1,96}")  # with an extension it fits a ustar name
_COMPRESSED = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ", "bzip2": b"BZh"}
_LABEL_LIMIT = 32  # bytes read of a label member; a class index has a few digits
_MAX_LABEL = 1 << 31  # labels are int32
_SYSTEM_FILES = (".ds_store", "thumbs.db", "desktop.ini")
_SYSTEM_PREFIXES = ("._", ".nfs")  # macOS: a file's attributes; NFS: a file that was deleted while open
_START = 12  # bytes that tell what a file is
_IMAGE_STARTS = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}
_DAMAGED = "truncated or damaged tar: "
_COMPRESSED_WITH = "compressed with "
_SYSTEM_NAME = "an image under the name of a system file; rename it"
_NO_IMAGE = f"no image member ({', '.join(IMAGE_EXTENSIONS)})"


@dataclass
class Sample:
    """One sample of a tar: the place of its image, and its problem, if it has one."""

    key: str
    extension: str = ""  # of the image or video, as in IMAGE_EXTENSIONS and VIDEO_EXTENSIONS
    image_field: str = ""  # `v1.jpg` of `photo.v1.jpg`
    offset: int = 0
    size: int = 0
    label: int | None = None
    label_text: str | None = None  # beginning of the label member; None without one
    problem: str = ""
    ignored: tuple[str, ...] = ()  # fields of other images of the sample: a depth map, a mask


@dataclass
class _KeyMembers:
    """The image and label members of one key."""

    key: str
    fields: set[str] = field(default_factory=set)
    images: list[tuple[str, Member]] = field(default_factory=list)  # (field, member)
    videos: list[tuple[str, Member]] = field(default_factory=list)
    label: int | None = None
    label_text: str | None = None


def split_member_name(name: str) -> tuple[str, str]:
    """(key, lower-case field) of a member: `a/b.seg.PNG` → (`a/b`, `seg.png`)."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def is_member_of(name: str, key: str) -> bool:
    """Whether a member with this name (see `printable`) may belong to the sample `key`, at whichever dot the key ends."""
    return name.startswith(f"{key}.") and "/" not in name[len(key) + 1 :]


def image_extension(name: str) -> str:
    """The image extension of a file name or field: `seg.PNG` → `png`, `jfif` → `jpg`; empty for no image."""
    extension = name.rpartition(".")[2].lower()
    extension = _OTHER_NAMES.get(extension, extension)
    return extension if extension in IMAGE_EXTENSIONS else ""


def video_extension(name: str) -> str:
    """The video extension of a file name or field: `v2.MP4` → `mp4`; empty for no video."""
    extension = name.rpartition(".")[2].lower()
    return extension if extension in VIDEO_EXTENSIONS else ""


def media_extension(name: str) -> str:
    """The image or video extension of a file name or field; empty for neither."""
    return image_extension(name) or video_extension(name)


def check_key(key: str) -> str:
    """Return `key`. Raises ValueError unless it has 1 to 96 letters, digits, `_` or `-`."""
    if not _WRITABLE_KEY.fullmatch(key):
        raise ValueError(f"key {key!r}: expected 1 to 96 letters, digits, '_' or '-' (a dot would split the name)")
    return key


def has_odd_key(sample: Sample) -> bool:
    """Whether `check_key` refuses a sample's key, or the key does not end at the only dot."""
    return not _WRITABLE_KEY.fullmatch(sample.key) or "." in sample.image_field


def printable(name: str) -> str:
    """A name that can be encoded as UTF-8: undecodable bytes appear as \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def is_damage(key: str, problem: str) -> bool:
    """Whether a row of an index means that its shard is cut short, damaged or no tar."""
    return not key and problem.startswith((_DAMAGED, _COMPRESSED_WITH))


def iterate_samples(file: BinaryIO) -> Iterator[Sample]:
    """Samples of a tar, in order; reads only headers and labels.

    If the tar is cut short or damaged, the last sample has no key, and its problem and offset say where; nothing is raised. Folders and
    system files (`._N.jpg`, `__MACOSX/`, `.DS_Store`, `Thumbs.db`) are skipped, also between members of one sample.
    """
    current: _KeyMembers | None = None
    try:
        for member in read_members(file):
            if not member.is_file:
                continue
            name = printable(member.name)
            key, field_name = split_member_name(name)
            if _is_system_file(name):
                if image_extension(field_name) and _is_image(file, member):
                    yield Sample(name, offset=member.offset, size=member.size, problem=_SYSTEM_NAME)
                continue
            if current is None or current.key != key or field_name in current.fields:
                if current is not None:
                    yield from _samples(current)
                current = _KeyMembers(key)
            _add_member(current, file, member, field_name)
    except DamagedTarError as error:
        if current is not None:
            yield from _cut_off(_samples(current), file.seek(0, io.SEEK_END))
        compression = _compression(file) if error.position == 0 else None
        yield Sample("", offset=error.position, problem=compression or f"{_DAMAGED}{error}")
    else:
        if current is not None:
            yield from _samples(current)


def written_samples(key: str, written: Iterable[tuple[str, bytes, int]]) -> Iterator[Sample]:
    """What `iterate_samples` finds for one key (see `check_key`), from its members as they are written.

    Args:
        written: (field, content, offset) of each member, in the order of the tar.
    """
    members = _KeyMembers(key)
    for field_name, content, offset in written:
        name, field_name = f"{key}.{field_name}", field_name.lower()
        if _is_system_file(name):
            continue
        members.fields.add(field_name)
        if image_extension(field_name):
            members.images.append((field_name, Member(name, offset, len(content), is_file=True, is_plain=True)))
        elif video_extension(field_name):
            members.videos.append((field_name, Member(name, offset, len(content), is_file=True, is_plain=True)))
        elif field_name == LABEL_FIELD:
            _set_label(members, content)
    if members.fields:
        yield from _samples(members)


def mark_parted(samples: Sequence[Sample]) -> None:
    """Set the problem of samples whose members are not adjacent, so that their key comes back.

    These are parts without an image, and parts whose only image is an extra one (`N.depth.png` far from `N.jpg`). A key that comes back
    with an image of its own is another sample.
    """
    by_key: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_key[sample.key].append(sample)
    for key, same in by_key.items():
        if len(same) == 1:
            continue
        has_image = any(_is_exact(sample.image_field) for sample in same if sample.image_field)
        for sample in same:
            is_beside = has_image and not sample.problem and not _is_exact(sample.image_field)
            if is_beside or sample.problem == _NO_IMAGE:
                sample.problem = (
                    f"the key {key!r} comes back: members of a sample must be adjacent (make the tar with --sort=name)"
                )


def _is_system_file(name: str) -> bool:
    folder, _, base = name.rpartition("/")
    return base.startswith(_SYSTEM_PREFIXES) or base.lower() in _SYSTEM_FILES or "__MACOSX" in folder.split("/")


def _is_image(file: BinaryIO, member: Member) -> bool:
    """Whether a member begins like an image; AppleDouble files have image names but do not."""
    file.seek(member.offset)
    return member.is_plain and image_format(file.read(_START)) is not None


def image_format(content: bytes) -> str | None:
    """`jpg`, `png` or `webp` by the first twelve bytes of an image; None for anything else, as an AVI, which begins like a WebP."""
    if content.startswith(b"RIFF") and content[8:_START] != b"WEBP":
        return None
    return next((name for start, name in _IMAGE_STARTS.items() if content.startswith(start)), None)


def _compression(file: BinaryIO) -> str | None:
    """The problem of a file that is no tar because it is compressed; None for any other."""
    file.seek(0)
    start = file.read(8)
    names = [name for name, magic in _COMPRESSED.items() if start.startswith(magic)]
    return f"{_COMPRESSED_WITH}{names[0]}; decompress it: images are read by their offset" if names else None


def _add_member(members: _KeyMembers, file: BinaryIO, member: Member, field_name: str) -> None:
    members.fields.add(field_name)
    if image_extension(field_name):
        members.images.append((field_name, member))
    elif video_extension(field_name):
        members.videos.append((field_name, member))
    elif field_name == LABEL_FIELD and member.is_plain:
        file.seek(member.offset)
        _set_label(members, file.read(min(member.size, _LABEL_LIMIT)))


def _set_label(members: _KeyMembers, content: bytes) -> None:
    text = content[:_LABEL_LIMIT].decode("ascii", "replace").strip()
    if text.isdigit() and int(text) < _MAX_LABEL:  # anything else is no label, and the sample counts as unlabeled
        members.label = int(text)
    members.label_text = text


def _is_exact(field_name: str) -> bool:
    """Whether an image's field is only an extension."""
    return "." not in field_name


def _samples(members: _KeyMembers) -> Iterator[Sample]:
    """The sample of one key, or a row with a problem for each of its images."""
    images = members.images or members.videos
    if not images:
        yield Sample(members.key, label=members.label, label_text=members.label_text, problem=_NO_IMAGE)
    elif len(images) == 1:
        yield _sample(members, *images[0])
    elif exact := [image for image in images if _is_exact(image[0])]:
        chosen = min(exact, key=lambda image: _EXTENSIONS.index(media_extension(image[0])))
        yield _sample(members, *chosen, tuple(name for name, _ in images if name != chosen[0]))
    else:
        for name, member in images:
            sample = _sample(members, name, member)
            sample.key = f"{members.key}.{name.rpartition('.')[0]}"
            sample.problem = (
                f"{len(images)} images have the key {members.key!r} and none is {members.key}.jpg, as the first dot of a name ends its "
                "key; rename the files, or pack their folder with data.pack"
            )
            yield sample


def _sample(members: _KeyMembers, name: str, member: Member, ignored: tuple[str, ...] = ()) -> Sample:
    problem = ""
    if not member.is_plain:
        problem = "image member is a link, a sparse or a special file; links are not followed"
    elif member.size == 0:
        problem = "image member is empty"
    elif member.size > MAX_IMAGE_BYTES:
        problem = f"image member of {member.size} bytes, more than the {MAX_IMAGE_BYTES} allowed"
    place, label = (member.offset, member.size), (members.label, members.label_text)
    return Sample(members.key, media_extension(name), name, *place, *label, problem, ignored)


def _cut_off(samples: Iterator[Sample], end: int) -> Iterator[Sample]:
    for sample in samples:
        if sample.offset + sample.size > end:
            sample.problem = "image cut off by the end of the tar"
        yield sample
