"""Pack a folder of images, or of videos, into WebDataset shards with a manifest, an index per shard and perceptual hashes.

    python -m data.pack images=FOLDER out=FOLDER [labeled=true] [validation=0.02] [samples_per_shard=10000] [seed=0] [group=PATTERN]
                        [processes=N] [modality=clip]

Labeled: one folder per class. Labels are positions in the sorted folder names; images go to `out/labeled` and, stratified by class,
`out/validation`. Unlabeled (`labeled=false`): all images below the folder go to `out/unlabeled`. Image bytes are not changed.
Images are shuffled with the seed. Byte-identical images stay in one split; so do images whose paths below `images` have the same
text in the parentheses of the regular expression `group`, as in group='^(.*)_view\\d+', or in its match if it has none.

`processes` (default: one per core) read and decode images and write shards; the shards do not depend on their number.

`modality=clip` packs videos instead of images (MP4, WebM, MKV, AVI, MOV; needs the extra [video]).

`rejected.txt` beside the shards lists files that are no images or cannot be decoded; `sources.parquet` has the path of each key.
After an interruption the same command continues with the next shard, if no file in the folder was added, removed or written since.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

_INTERRUPTED = 130  # exit code after Ctrl-C


def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    try:
        # here: Ctrl-C while NumPy and pyarrow are loaded is no traceback either
        from .packing.pack_folder import pack
        from .settings import run_command

        return run_command(pack, arguments, __doc__ or "")
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
