"""Is it the images or the recipe? ``granq quantize`` with recipe match, on real images instead of generated ones.

python benchmarks/controls.py folder:cifar100 --data folder:cifar10 ...: the first argument names data with a train
split, whose images take the place of the refined ones; all the others are those of ``granq quantize``. Labels are read
by nothing that match minimizes. The row in ``result.json`` says in ``method`` and ``data_used`` what was done.
"""

import json
import sys

import torch

import granq
from granq import runs
from granq.app.jobs import channels, from_arguments
from granq.data import dataset_name, normalize
from granq.files import save_atomically, to_json
from granq.match import Match
from granq.qat import Game


def main(source: str, *argv: str) -> None:
    """Make a run on the images of ``source``."""
    job = from_arguments(argv)
    spec = granq.describe_data(source, job.network, job.image_size, **channels(job.mean, job.std))
    train = granq.load_split(spec, "train")

    class RealImages(Match):
        def draw(self, game: Game) -> tuple[torch.Tensor, torch.Tensor]:
            if self.refined is None:
                order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.config.seed))
                images, labels = zip(*(train[int(i)] for i in order[: self.config.refined_images]), strict=True)
                pixels = normalize(torch.stack(images), spec).contiguous(memory_format=torch.channels_last)
                self.refined = pixels.to(game.device), torch.tensor([int(label) for label in labels]).to(game.device)
            return super().draw(game)

    runs.RECIPES["match"] = RealImages
    row = job.run()
    row |= {"method": f"{row['method']}, real images of {dataset_name(source)}", "data_used": f"real, {source}"}
    path = job.out / "result.json"
    save_atomically(path, lambda temporary: temporary.write_text(to_json(row, indent=2)))
    print(json.dumps({name: row[name] for name in ("method", "ptq_top1", "last_top1", "teacher_top1")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
