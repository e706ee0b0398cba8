"""Result of an upload of images: what was added, moved, already there or refused, each by name."""

from dataclasses import dataclass, field
from typing import Any

from ...dataset_schemas import (
    MAX_NAME_CHARACTERS,
    MAX_NAMED,
    AddCounts,
    AddedImage,
    ImagesAdded,
    MovedImage,
    RefusedImage,
)
from ...registry.datasets.entries import AddStatus, NewImage


@dataclass
class UploadReport:
    """Result of a request so far."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(AddCounts.model_fields, 0))
    added: list[AddedImage] = field(default_factory=list)
    there: list[AddedImage] = field(default_factory=list)
    moved: list[MovedImage] = field(default_factory=list)
    refused: list[RefusedImage] = field(default_factory=list)
    similar: dict[str, str] = field(default_factory=dict)
    audited: bool = False

    def refuse(self, name: str, reason: str) -> None:
        self.counts["refused"] += 1
        if len(self.refused) < MAX_NAMED:
            self.refused.append(RefusedImage(name=name[-MAX_NAME_CHARACTERS:], reason=reason))

    def record(self, image: NewImage, status: AddStatus) -> None:
        found: dict[str, Any] = {"name": image.name, "digest": image.digest, "label": image.label}
        match status.status:
            case "added":
                self._append("added", self.added, AddedImage(**found))
            case "moved":
                self._append("moved", self.moved, MovedImage(before=status.before, **found))
            case "there":
                self._append("already_there", self.there, AddedImage(**found))
            case _:
                self.refuse(image.name, status.error)
        if status.similar and image.label:
            self.similar[image.label] = status.similar

    def _append(self, count: str, images: list[Any], image: AddedImage) -> None:
        self.counts[count] += 1
        if len(images) < MAX_NAMED:
            images.append(image)

    def reply(self) -> ImagesAdded:
        warnings = [
            f"label {new!r} differs from label {old!r} only in case, spaces or Unicode form; merge them if they are one"
            for new, old in self.similar.items()
        ]
        return ImagesAdded(
            counts=AddCounts(**self.counts),
            added=self.added,
            already_there=self.there,
            moved=self.moved,
            refused=self.refused,
            warnings=warnings,
        )
