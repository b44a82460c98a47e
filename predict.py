"""Labels the photos of a folder with the network of a run, at their own resolution.

    python predict.py --checkpoint runs/.../checkpoint.pt --photos photos --out labelled

It writes label maps, their colours, and overlays. The ids are Cityscapes' label ids, or train ids
of own classes; OUT/classes.json lists them. --benchmark own can read that file.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import common
import datasets
from datasets import (
    CITYSCAPES_IDS,
    UserError,
    palette,
    read_image,
    replacing,
    show_progress,
    write_json,
)


@dataclass(frozen=True)
class Args:
    checkpoint: Path
    """The checkpoint.pt of a run."""
    photos: Path
    """Folder of photos, JPG or PNG of any mode and size, with its subfolders."""
    out: Path
    """Folder for ids/, colours/ and overlays/, with a PNG for each photo, and for classes.json."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1."""


def run(args: Args) -> None:
    net, checkpoint = common.read_network(args.checkpoint)
    device = torch.device(common.join_processes(args.device))
    classes, size, own = checkpoint["classes"], checkpoint["size"], checkpoint["benchmark"] == "own"
    net.to(device).eval()
    ids = {name: i if own else CITYSCAPES_IDS[name] for i, name in enumerate(classes)}
    photos, others = datasets.find_images(args.photos, "**/*")
    outputs = {Path(name).with_suffix(".png"): name for name in sorted(photos.values())}
    if not photos:
        raise UserError(f"{args.photos}: no JPG or PNG file")
    same = sorted(set(photos.values()) - set(outputs.values()))
    if same:
        raise UserError(f"{args.photos / same[0]}: another photo differs by its suffix alone")
    inputs, out = args.photos.resolve(), args.out.resolve()
    written = [out / name for name in ("ids", "colours", "overlays")]
    if out.is_relative_to(inputs) or any(inputs.is_relative_to(folder) for folder in written):
        raise UserError(f"--out {args.out}: the photos must lie elsewhere")
    legend = args.out / "classes.json"
    if legend.exists() and common.read_json(legend) != ids:  # perhaps that of own data
        raise UserError(f"{legend}: has other classes; give another --out")
    write_json(legend, ids)
    failed = 0
    for output, name in show_progress(outputs.items(), "labelling"):
        try:
            photo = read_image(args.photos / name)  # [h,w,3]
        except UserError as error:  # the other photos are labelled
            failed += 1
            print(f"left out: {error}")
            continue
        small = Image.fromarray(photo).resize(size[::-1], Image.Resampling.BILINEAR)
        logits = common.predict(net, np.array(small)[None], device)  # [1,C,H,W]
        train_ids = common.upsample(logits, photo.shape[:2])[0].argmax(dim=0).cpu().numpy()
        values = np.array([*ids.values()], np.uint8)[train_ids]  # [h,w]
        colours = palette(classes)[train_ids]  # [h,w,3]
        pictures = {"ids": values, "colours": colours, "overlays": photo // 2 + colours // 2}
        for folder, picture in pictures.items():
            with replacing(args.out / folder / output) as temporary:
                Image.fromarray(picture).save(temporary, format="PNG")
    ignored = f"{len(others)} other files ignored" + (f", such as {others[0]}" if others else "")
    print(f"{args.out}: {len(photos) - failed} photos labelled, {ignored}")
    if failed:
        raise UserError(f"{args.photos}: photos that cannot be read: {failed}, named above")


if __name__ == "__main__":
    common.main(Args, run, __doc__)
