"""Outlines of lungs and lesions: EfficientNet-Lite0 with a light decoder, trained on slices with masks.

`--config=configs/lesions.py:<dir>[,<dir>...]` trains on folders of slices or scans with masks, and on raw COVIDx-CT
directories, whose normal slices show no lesions (docs/lesions.md describes the folders). Without a directory the run
uses generated phantoms at demo scale.
"""

from ml_collections import ConfigDict


def get_config(raw_dir: str = '') -> ConfigDict:
    """Returns the values for real slices with directories, demo values without."""
    config = ConfigDict()
    config.name = 'lesions'
    config.seed = 0  # for initial weights, data order and augmentation

    config.data = data = ConfigDict()
    data.raw_dir = raw_dir  # directories, separated by commas; empty: phantoms
    data.sources = ''  # the sources to use, separated by commas; empty: all
    data.image_size = 224  # side of a whole slice, pixels; a multiple of 32
    data.phantom_seed = 0  # seed of the phantoms; unused with a directory

    config.model = model = ConfigDict()
    # 'efficientnet-lite0' (ImageNet), 'box' (the lesion model of this package), a .safetensors file of an exported
    # lesion run, or empty: from scratch
    model.pretrained = 'efficientnet-lite0'
    model.mirror = True  # evaluation averages over a slice and its mirror image

    config.train = train = ConfigDict()
    train.batch_size = 16  # slices per step, over all devices
    train.steps_per_epoch = 0  # 0: one pass, in which slices with lesions come twice
    train.num_epochs = 32  # maximum
    train.patience = 32  # epochs without a better validation loss before stopping
    train.min_delta = 1e-4  # smallest decrease that counts as better
    train.learning_rate = 1e-3  # for Adam
    train.schedule = 'cosine'  # 'constant' or 'cosine' (to 0 at the last step)
    train.warmup_steps = 60  # steps of linear warm-up from 0
    train.weight_decay = 0.05
    train.decay = 'decoupled'  # 'decoupled' (AdamW) or 'l2' (in the gradient)
    train.augment = 'scanner'  # 'none', 'paper' or 'scanner', as in att2.py
    train.scale = (0.8, 1.2)  # zoom; with the next two, of 'paper'
    train.brightness = 0.3  # half-width of the range of a factor about 1
    train.contrast = 0.3  # likewise, of the distance from the mean grey
    train.ema_decay = 0.98  # of a moving average of the weights, which is validated and tested; 0: none
    train.dtype = 'float32'  # activations: 'float32' or 'bfloat16'; parameters and sums stay float32
    train.accumulation_steps = 1  # split a batch into this many parts, computed one after the other to save memory
    train.parallelism = 'jit'  # over devices: 'jit' (the compiler shards the batch) or 'pmap'
    train.checkpoint_steps = 0  # steps between checkpoints within an epoch; 0: only at the end of each epoch

    if not raw_dir:
        data.image_size = 96
        train.steps_per_epoch = 80
        train.num_epochs = 4
    return config.lock()
