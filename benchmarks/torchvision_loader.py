"""The recipe's crops as torchvision and PyTorch's DataLoader make them: what the loader is compared with."""

import random

import torch
import torchvision
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from bincomm.data.crops import Crops


class Blur:
    """Pillow's blur, which DINO's code uses; torchvision's own is several times slower on such images."""

    def __init__(self, probability: float):
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.probability:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))


def view_transforms(crops: Crops, kind: str) -> list:
    """A transform for each view: of Pillow images by torchvision's v1 or v2, or of tensors by v2."""
    t = v1 if kind == "v1" else v2
    ends = {
        "v1": [v1.ToTensor()],
        "v2": [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)],
        "tensors": [v2.ToDtype(torch.float32, scale=True)],
    }

    def blur(probability: float):
        if kind == "tensors":  # three deviations to both sides, as Pillow and DALI do
            return v2.RandomApply([v2.GaussianBlur(13, (0.1, 2))], p=probability)
        return Blur(probability)

    def view(size: int, scale: tuple[float, float], blur_p: float, solarize_p: float):
        bicubic = v1.InterpolationMode.BICUBIC
        return t.Compose(
            [
                t.RandomResizedCrop(size, scale, interpolation=bicubic, antialias=True),
                t.RandomHorizontalFlip(crops.flip),
                t.RandomApply([t.ColorJitter(*crops.jitter)], p=crops.jitter_p),
                t.RandomGrayscale(crops.gray),
                blur(blur_p),
                *([t.RandomSolarize(128, solarize_p)] if solarize_p else []),
                *ends[kind],
                t.Normalize(Crops.mean, Crops.std),
            ]
        )

    large = [
        view(crops.global_size, crops.global_scale, crops.blur[0], 0),
        view(crops.global_size, crops.global_scale, crops.blur[1], crops.solarize),
    ]
    small = view(crops.local_size, crops.local_scale, crops.blur[2], 0)
    return large + [small] * crops.local_crops


class Images(Dataset):
    """Decoded images, or all crops of each where `transforms` are given.

    Decoded by torchvision where `tensors` is true, else by Pillow; with `discard` they stay in the worker.
    """

    def __init__(
        self, files: list[str], transforms: list | None = None, tensors: bool = False, discard: bool = False
    ):
        self.files, self.transforms, self.tensors, self.discard = files, transforms, tensors, discard

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        file = self.files[index]
        if self.tensors:
            content = torchvision.io.read_file(file)
            image = torchvision.io.decode_image(content, mode=torchvision.io.ImageReadMode.RGB)
        else:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        if self.transforms is not None:
            return [transform(image) for transform in self.transforms]
        if self.discard:
            return None
        return image if self.tensors else v1.functional.pil_to_tensor(image)


def batches(images: Images, batch_size: int, workers: int):
    """Batches of crops, or lists of images of their own sizes."""
    collate = None if images.transforms is not None else list
    return DataLoader(images, batch_size, shuffle=True, num_workers=workers, collate_fn=collate)
