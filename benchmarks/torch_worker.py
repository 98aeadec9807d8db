"""The PyTorch worker of the benchmarks: eager, like the paper's code, with torchvision's ResNet, transforms and loader,
and the light model of efficientnet_lite_pytorch.

Needs `requirements-torch.txt`. From this project it imports only the model, which the tests compare with ours.
"""

import itertools

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks import workers
from tests.goldens.torch_models import Lite0Att2, Lite0Lesions, ResNet50Att2

NUM_WORKERS = 2
CLASS_WEIGHTS = torch.ones(3)

# Same ranges as covidjax.training.augment. The transforms are faster on Pillow images than on tensors.
AUGMENTATION = (
    transforms.RandomHorizontalFlip(),
    transforms.RandomVerticalFlip(),
    transforms.GaussianBlur(7, (0.05, 2.0)),
    transforms.RandomAffine(
        30,
        translate=(0.1, 0.1),
        scale=(0.9, 1.1),
        shear=20,
        interpolation=transforms.InterpolationMode.BILINEAR,
    ),
)


def draw_images(options):
    images = np.random.default_rng(0).integers(
        0, 256, (options.batch_size, 1, options.image_size, options.image_size), dtype=np.uint8
    )
    return torch.from_numpy(images).float().div(127.5).sub(1)


def to_input(images, options):
    """Repeats grey images [B, 1, S, S] to three channels, [B, 3, S, S]."""
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    return images.repeat(1, 3, 1, 1).contiguous(memory_format=layout)


def create_model(options):
    torch.manual_seed(0)
    model = {'resnet': ResNet50Att2, 'efficientnet_lite0': Lite0Att2, 'lesions': Lite0Lesions}[options.model]()
    return model.to(memory_format=torch.channels_last) if options.channels_last else model


def compute_mask_loss(logits, targets):
    """Computes `losses.compute_mask_losses` of planes that are all known, float32 [B, h, h, 3]."""
    lesion = targets[..., 1]
    shares = torch.stack([torch.ones_like(lesion), torch.ones_like(lesion), lesion], -1)
    targets = torch.cat([targets[..., :2], (targets[..., 2:] / lesion[..., None].clamp(min=1e-6)).clamp(max=1)], -1)
    crosses = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, targets, reduction='none', pos_weight=torch.tensor([1.0, 2.0, 1.0])
    )
    cross = (shares * crosses).sum((1, 2)) / shares.sum((1, 2)).clamp(min=1e-6)
    p = torch.sigmoid(logits)
    outlined = (shares * targets).sum((1, 2))
    dice = 1 - 2 * (shares * p * targets).sum((1, 2)) / ((shares * p).sum((1, 2)) + outlined + 1e-6)
    return (3 * cross + torch.where(outlined > 0, dice, 0)).sum(-1).mean()


def create_train_round(options):
    """Returns a function that makes one step per batch (images, labels or planes)."""
    model = create_model(options).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    loss_function = compute_mask_loss if options.model == 'lesions' else torch.nn.CrossEntropyLoss(CLASS_WEIGHTS)

    def train(batches):
        count = 0
        for images, labels in batches:
            optimizer.zero_grad()
            with torch.autocast('cpu', torch.bfloat16, enabled=options.dtype == 'bfloat16'):
                outputs = model(to_input(images, options))
                logits = outputs if options.model == 'lesions' else outputs[0]
                loss = loss_function(logits.float(), labels)
            loss.backward()
            optimizer.step()
            loss.item()
            count += len(labels)
        return count

    return train


def start_training(options):
    train = create_train_round(options)
    rng = np.random.default_rng(1)
    if options.model == 'lesions':
        side = options.image_size // 4
        targets = torch.from_numpy(rng.uniform(size=(options.batch_size, side, side, 3)).astype(np.float32))
    else:
        targets = torch.from_numpy(rng.integers(0, 3, options.batch_size))
    batch = draw_images(options), targets
    return lambda: train(itertools.repeat(batch, options.steps)), describe()


def start_inference(options):
    dtype = getattr(torch, options.dtype)  # the whole model in this dtype is faster than autocast
    model = create_model(options).eval().to(dtype)
    images = draw_images(options).to(dtype)

    def infer():
        with torch.inference_mode():
            for _ in range(options.steps):
                model(to_input(images, options))
        return options.batch_size * options.steps

    return infer, describe()


def start_outlines(options):
    """A round outlines `steps` batches of slices, averaged over each slice and its mirror image."""
    model = create_model(options).eval()
    images = draw_images(options)

    def outline():
        with torch.inference_mode():
            for _ in range(options.steps):
                logits = model(to_input(images, options)) + model(to_input(images.flip(-1), options)).flip(2)
                torch.sigmoid(logits / 2).half()
        return options.batch_size * options.steps

    return outline, describe()


class GreyImages(Dataset):
    """Decoded images in memory; each one is augmented on access."""

    def __init__(self, images, transform):
        self._images = images
        self._transform = transform

    def __len__(self):
        return len(self._images)

    def __getitem__(self, index):
        return self._transform(self._images[index])


def create_loader(dataset, options, **more):
    # Workers persist between rounds: their start-up is negligible in an epoch of 1000 steps, but not in a round.
    return DataLoader(
        dataset, options.batch_size, num_workers=NUM_WORKERS, persistent_workers=True, drop_last=True, **more
    )


def start_augmentation(options):
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (options.image_size, options.image_size), dtype=np.uint8))
        for _ in range(options.batch_size * options.steps)
    ]
    loader = create_loader(GreyImages(images, transforms.Compose([*AUGMENTATION, transforms.ToTensor()])), options)
    return lambda: sum(map(len, loader)), describe()


def start_epoch(options):
    """A round is an epoch of `steps` batches, sampled from a folder of PNGs."""
    transform = transforms.Compose(
        [transforms.Grayscale(), *AUGMENTATION, transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    )
    dataset = ImageFolder(options.folder, transform)
    sampler = torch.utils.data.RandomSampler(dataset, num_samples=options.batch_size * options.steps)
    loader = create_loader(dataset, options, sampler=sampler)
    train = create_train_round(options)
    return lambda: train(loader), describe()


def describe():
    return {
        'torch': torch.__version__,
        'torchvision': torchvision.__version__,
        'threads': torch.get_num_threads(),
    }


if __name__ == '__main__':
    workers.serve(
        {
            'train': start_training,
            'inference': start_inference,
            'outline': start_outlines,
            'augment': start_augmentation,
            'epoch': start_epoch,
        }
    )
