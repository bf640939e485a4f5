"""Use pseudo-labels in another project: `pip install noisy-student-pipeline` is enough, without torch.

    from noisy_student import PseudoLabels, load_image

    labels = PseudoLabels("runs/mine", min_confidence=0.3)  # a run, an export, or the address of stage=serve
    table = labels.table()
    for image, label in labels: …
    loader = DataLoader(labels.dataset(transform, shuffle=1000), batch_size=256, num_workers=8)  # with torch
    predictions = Classifier("runs/mine/gen-1/student/weights")(["a.jpg", "b.png"])  # with torch and timm

A project's own folder `data/` hides the pipeline's package `data`. `noisy_student._data` has the same files under a name that is
never hidden, in loader workers too. Its classes are not those of `data`: import from one of the two.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a type checker does not follow `_data.__path__`
    from data.errors import DataError
    from data.images.load import load_image
    from data.labels.pseudo_labels import PseudoLabels
    from data.storage import StorageError
else:
    from ._data.errors import DataError
    from ._data.images.load import load_image
    from ._data.labels.pseudo_labels import PseudoLabels
    from ._data.storage import StorageError

from .classifier import Classifier, Prediction

__all__ = ["Classifier", "DataError", "Prediction", "PseudoLabels", "StorageError", "load_image"]
